"""What each rank runs: contenders in turns behind a barrier; a round lasts as long as its slowest
rank. A contender's local part is the same without the time inside `torch.distributed.all_reduce`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import distclip
from benchmarks import problems
from benchmarks.layouts import LAYOUTS
from benchmarks.timing import Effort, quiet

Runs = Mapping[str, Callable[[], object]]


def measure_layout(name: str, variant: str, count: int, effort: Effort) -> dict[str, Any]:
    """On every rank: idle and active rounds. The answer is that of the slowest rank in each
    round."""
    built = LAYOUTS[name].build(count, variant)
    grads = [p.grad for p in built.model.parameters() if p.grad is not None]
    restore = problems.restorer([g.to_local() if isinstance(g, DTensor) else g for g in grads])
    clipper = distclip.GradClipper(built.model, 1.0)
    norm = float(clipper.measure().total_norm)
    out: dict[str, Any] = {}
    for state, limit, before in (("idle", 2 * norm, None), ("active", norm / 2, restore)):
        runs = {contender: make(limit) for contender, make in built.contenders.items()}
        out[state] = in_turns(runs, effort, before and dict.fromkeys(runs, before)) | message(
            clipper.plan.words, effort
        )
        restore()
    return out


def in_turns(
    runs: Runs, effort: Effort, before: Runs | None = None
) -> dict[str, dict[str, list[float]]]:
    """Wall seconds and those of the local part (of the slowest rank), and CPU seconds (of all ranks
    together), by contender and round; `before` is not timed."""
    names, before = list(runs), before or {}
    with quiet(), time_all_reduces() as inside:
        for name in names:
            once(runs[name], before.get(name), inside)  # caches and lazily made state
        pilot = torch.tensor(sum(once(runs[name], before.get(name), inside)[0] for name in names))
        dist.all_reduce(pilot, op=dist.ReduceOp.MAX)  # all ranks make as many rounds
        # a turn also has a barrier and a restored copy
        fitting = int(effort.seconds / (2 * float(pilot)))
        rounds = max(3, min(effort.most, max(fitting, min(effort.least, 5 * fitting))))
        found = torch.zeros(3, len(names), rounds, dtype=torch.float64)
        for i in range(rounds):
            for k in range(len(names)) if i % 2 == 0 else reversed(range(len(names))):
                times = once(runs[names[k]], before.get(names[k]), inside)
                found[:, k, i] = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(found[:2], op=dist.ReduceOp.MAX)
    dist.all_reduce(found[2], op=dist.ReduceOp.SUM)
    kinds = "wall", "local", "cpu"
    return {kind: dict(zip(names, rows)) for kind, rows in zip(kinds, found.tolist())}


def once(
    run: Callable[[], object], before: Callable[[], object] | None, inside: list[float]
) -> tuple[float, float, float]:
    """Seconds: on the wall, of these outside all-reduces, of the processor."""
    if before is not None:
        before()
    dist.barrier()
    inside.clear()
    processor, start = time.process_time(), time.perf_counter()
    run()
    wall = time.perf_counter() - start
    return wall, wall - sum(inside), time.process_time() - processor


@contextmanager
def time_all_reduces() -> Iterator[list[float]]:
    """The seconds inside each call of `torch.distributed.all_reduce`, waiting for other ranks
    included; for peers and distclip alike."""
    inside: list[float] = []
    send = dist.all_reduce

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return send(*args, **kwargs)
        finally:
            inside.append(time.perf_counter() - start)

    dist.all_reduce = timed
    try:
        yield inside
    finally:
        dist.all_reduce = send


def message(words: int, effort: Effort) -> dict[str, Any]:
    """A bare all-reduce as long as distclip's message, and one of a single number, such as FSDP1's
    own method sends."""
    vector, number = torch.zeros(words, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    short = Effort(seconds=effort.seconds / 5, least=effort.least, most=effort.most)
    times = in_turns(
        {"message": lambda: dist.all_reduce(vector), "one": lambda: dist.all_reduce(number)}, short
    )["wall"]
    return {"message": times["message"], "one": times["one"], "words": words}
