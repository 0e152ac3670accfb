"""Set-up on threaded worlds: CPU time, messages, bytes and memory a rank; and the set-up's
arithmetic alone for larger worlds."""

from __future__ import annotations

import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from distclip.exchange.channel import Channel, hash64
from distclip.records import ParamHolding, ParamPiece
from distclip.setup.inventory import HoldingTables, RemoteHolding
from distclip.setup.plan import make_plan
from distclip.setup.replicas import find_replicas
from distclip.testing import ThreadGroup, run_threads

CPU = torch.device("cpu")
WHOLE = ParamHolding("whole", "whole", ("all",))


def sharded(rank: int, size: int, count: int) -> list[ParamPiece]:
    """FSDP2-like: all ranks name the same parameters, each holds its own part."""
    part = ParamHolding("Shard(0)", f"{rank}/{size}", ("mesh",))
    return [
        ParamPiece(f"p{i}", f"p{i}", part, (size, 8), 8 * size, (1, 8), None) for i in range(count)
    ]


def two_dimensional(rank: int, size: int, count: int) -> list[ParamPiece]:
    """Copied over half of the ranks and sharded over the rest, with biases held by all."""
    part = ParamHolding("Replicate, Shard(0)", f"{rank % (size // 2)}", ("mesh",))
    weights = [
        ParamPiece(f"p{i}", f"p{i}", part, (size // 2, 8), 4 * size, (1, 8), None)
        for i in range(count // 2)
    ]
    return weights + [
        ParamPiece(f"b{i}", f"b{i}", WHOLE, (8,), 8, (8,), None) for i in range(count // 2)
    ]


def private(rank: int, size: int, count: int) -> list[ParamPiece]:
    """Stages and experts: every rank names parameters of its own."""
    return [
        ParamPiece(f"r{rank}.p{i}", f"r{rank}.p{i}", WHOLE, (8,), 8, (8,), None)
        for i in range(count)
    ]


LAYOUTS: dict[str, Callable[[int, int, int], list[ParamPiece]]] = {
    "sharded, equal tables": sharded,
    "2-D mesh, equal tables": two_dimensional,
    "private names, every table another": private,
}


class Counting:
    """Counts the bytes of a thread group's all-reduces while it is entered."""

    def __enter__(self) -> Counting:
        self.original = ThreadGroup.allreduce
        self.bytes: dict[int, int] = {}
        counted = self.bytes

        def allreduce(group: ThreadGroup, tensors: list[Tensor], opts: Any = None) -> Any:
            counted[group.rank()] = counted.get(group.rank(), 0) + sum(
                t.numel() * t.element_size() for t in tensors
            )
            return self.original(group, tensors, opts)

        ThreadGroup.allreduce = allreduce
        return self

    def __exit__(self, *_: object) -> None:
        ThreadGroup.allreduce = self.original


def set_up(group: ThreadGroup, layout: str, count: int, grouped: bool) -> tuple[float, int, Any]:
    """CPU seconds of this rank's thread, its messages, and the plan."""
    channel = Channel(group, range(group.size()), group.rank())
    pieces = LAYOUTS[layout](channel.rank, channel.size, count)
    groups = [piece.name for piece in pieces] if grouped else ["all"] * len(pieces)
    start = time.thread_time()
    plan = make_plan(channel, pieces, groups, {}, 2.0, CPU)
    return time.thread_time() - start, group.calls, plan


def world(layout: str, ranks: int, count: int, grouped: bool) -> dict[str, Any]:
    """One threaded world. The median over ranks: rank 0 also does the reducing for all."""
    threading.stack_size(1 << 20)
    with Counting() as counting:
        answers = run_threads(ranks, set_up, layout, count, grouped, timeout_s=300.0)
    plan = answers[0][2]
    return {
        "layout": layout,
        "ranks": ranks,
        "parameters": count,
        "groups": len(plan.groups),
        "seconds": statistics.median(answer[0] for answer in answers),
        "messages": answers[0][1],
        "bytes": counting.bytes[0],
        "kept": held_by(plan),
        "words": plan.words,
    }


def held_by(root: object) -> int:
    """Bytes of all objects that `root` keeps alive, each once: what the process holds as a whole
    moves by more than that."""
    seen: dict[int, object] = {}
    left = [root]
    while left:
        one = left.pop()
        if id(one) not in seen and not isinstance(one, (type, ModuleType, FunctionType)):
            seen[id(one)] = one
            left += gc.get_referents(one)
    return sum(
        one.nbytes if isinstance(one, Tensor) else sys.getsizeof(one) for one in seen.values()
    )


def worlds(quick: bool) -> list[dict[str, Any]]:
    count = 50 if quick else 1000
    world("sharded, equal tables", 4, 10, False)  # caches
    out: list[dict[str, Any]] = []
    for layout in LAYOUTS:
        for grouped in (False, True):
            for ranks in (4, 8) if quick else (8, 32, 128, 256):
                # every rank holds all tables: more would ask this one machine for what many share
                if quick or layout != "private names, every table another" or ranks <= 32:
                    out.append(world(layout, ranks, count, grouped))
    return out


def tables_of(layout: str, ranks: int, count: int) -> HoldingTables:
    """What `exchange_tables` would give on a world of that size, made here."""
    if layout.startswith("private"):
        rows = [
            torch.tensor([(hash64(f"r{r}.p{i}"), 0, 0, 0) for i in range(count)])
            for r in range(ranks)
        ]
        return HoldingTables(
            [[RemoteHolding("whole", 0, (1,), (), False)]] * ranks,
            [[r] for r in range(ranks)],
            rows,
            0,
            [],
        )
    holdings = [[RemoteHolding("Shard(0)", r, (1,), (1,), False)] for r in range(ranks)]
    return HoldingTables(
        holdings,
        [list(range(ranks))],
        [torch.tensor([(hash64(f"p{i}"), 0, 0, 0) for i in range(count)])],
        0,
        [],
    )


def arithmetic(quick: bool) -> list[dict[str, Any]]:
    """CPU seconds in which one rank finds all holders, for worlds larger than threads can play."""
    count = 50 if quick else 1000
    sizes = {
        "sharded, equal tables": (64, 128) if quick else (256, 1024, 4096, 16_384),
        "private names, every table another": (8, 16) if quick else (64, 256, 1024),
    }
    out: list[dict[str, Any]] = []
    for layout, many in sizes.items():
        for ranks in many:
            tables = tables_of(layout, ranks, count)
            pieces = LAYOUTS[layout](0, ranks, count)
            start = time.process_time()
            find_replicas(tables, 0, pieces)
            seconds = time.process_time() - start
            sent = 8 * (
                3 * ranks
                + 15 * ranks
                + 4 * sum(map(len, tables.rows))
                + 2 * sum(map(len, tables.rows))
            )
            out.append(
                {
                    "layout": layout,
                    "ranks": ranks,
                    "parameters": count,
                    "seconds": seconds,
                    "bytes": sent,
                }
            )
    return out
