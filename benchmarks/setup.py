"""Set-up and first call for many DTensors; torch's first call grows with their square."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import clip_grad_norm_

import distclip
from benchmarks import problems
from benchmarks.floors import ceiling, floor
from benchmarks.records import Row, Spread
from benchmarks.timing import Effort
from distclip.testing import World

BUILD, CLIP, DROP_IN, TORCH = (
    "GradClipper(...)",
    "clip_, first call",
    "distclip.clip_grad_norm_, first call",
    "torch clip_grad_norm_, first call",
)


def setup(effort: Effort, kernels: str) -> list[Row]:
    with_torch, alone = (
        ((20, 40), (40, 80))
        if effort.quick
        else ((500, 1000, 2000), (1000, 2000, 5000, 10_000, 20_000))
    )
    rows: list[Row] = []
    for count in with_torch:
        # a new one each: what torch cached for some tensors must not help it with more
        with World(2) as world:
            found = world.run(first_calls, count, True, timeout=500.0)[0]
        found[f"{BUILD} and first clip_"] = found[BUILD] + found[CLIP]
        for ours in (DROP_IN, CLIP, f"{BUILD} and first clip_"):
            limits = floor("first call" if count == max(with_torch) else "", kernels)
            ratio = Spread.of([found[TORCH] / found[ours]])
            rows.append(
                Row(
                    "setup", f"{count:,} DTensors", ratio, "x", ours, TORCH, Spread.of([found[TORCH]]), Spread.of([found[ours]]),
                    kernels=kernels, ranks=2, main=ours == DROP_IN, **limits,
                )
            )  # fmt: skip
    per_parameter: dict[str, list[float]] = {}
    for count in alone:
        with World(2) as world:
            found = world.run(first_calls, count, False, timeout=500.0)[0]
        for ours, seconds in found.items():
            each = 1e6 * seconds / count
            per_parameter.setdefault(ours, []).append(each)
            what = f"{count:,} DTensors, a parameter"
            rows.append(
                Row(
                    "setup",
                    what,
                    Spread.of([each]),
                    "us",
                    ours,
                    ours_s=Spread.of([seconds]),
                    kernels=kernels,
                    ranks=2,
                )
            )
    for ours, each in per_parameter.items():
        what = f"time a parameter, {alone[-1]:,} to {alone[0]:,}"
        value = Spread.of([each[-1] / each[0]])
        rows.append(
            Row(
                "setup",
                what,
                value,
                "times",
                ours,
                kernels=kernels,
                ranks=2,
                **ceiling("time a parameter, 20,000 to 1,000", kernels),
            )
        )
    return rows


def first_calls(count: int, with_torch: bool) -> dict[str, float]:
    """Seconds of each, slowest rank; distclip first, so that torch finds at least the same caches
    warm."""
    build = distclip.GradClipper  # imported here, which is no part of a call
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params: list[Any] = []
    for _ in range(count):
        param = torch.nn.Parameter(
            DTensor.from_local(torch.zeros(8), mesh, [Shard(0)], run_check=False)
        )
        param.grad = DTensor.from_local(torch.ones(8), mesh, [Shard(0)], run_check=False)
        params.append(param)
    clippers: list[distclip.GradClipper] = []
    calls: dict[str, Callable[[], object]] = {
        BUILD: lambda: clippers.append(build(problems.named(params), 1e9)),
        CLIP: lambda: clippers[0].clip_(),
        "clip_, second call": lambda: clippers[0].clip_(),
        DROP_IN: lambda: distclip.clip_grad_norm_(params, 1e9),
    }
    if with_torch:
        calls[TORCH] = lambda: clip_grad_norm_(params, 1e9)
    out: dict[str, float] = {}
    for name, call in calls.items():
        dist.barrier()
        start = time.perf_counter()
        call()
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        out[name] = float(seconds)
    return out
