"""What groups cost: one all-reduce whatever their number."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import distclip
from benchmarks import problems
from benchmarks.floors import ceiling
from benchmarks.on_ranks import in_turns
from benchmarks.records import Row, Spread
from benchmarks.timing import Contender, Effort, interleaved
from distclip.groups import Grouping
from distclip.testing import World


class Blocks(Grouping):
    """A grouping of `count` groups of neighbouring parameters."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __repr__(self) -> str:
        return f"Blocks({self.count})"

    def assign(self, names: Any, params: Any) -> list[str]:
        return [f"g{i * self.count // len(names)}" for i in range(len(names))]


def split_gpt2(pieces: int, quick: bool) -> problems.Shapes:
    """GPT-2's elements in about `pieces` tensors: the matrices cut along their first dimension."""
    shapes = problems.gpt2(quick)
    most = -(-sum(torch.Size(s).numel() for s in shapes) // (pieces - len(shapes)))
    out: problems.Shapes = []
    for shape in shapes:
        rows = max(1, most // torch.Size(shape[1:]).numel())
        out += (
            [(min(rows, shape[0] - start), *shape[1:]) for start in range(0, shape[0], rows)]
            if len(shape) > 1
            else [shape]
        )
    return out


def groups(effort: Effort, kernels: str) -> list[Row]:
    ranks, count = (2, 300) if effort.quick else (4, 10_000)
    with World(ranks) as world:  # before this process makes threads of its own
        shared = world.run(on_ranks, count, effort, timeout=400.0)[0]
    counts = [1, 10, 100] if effort.quick else [1, 10, 100, 1_000, 10_000]
    params = problems.parameters([(100,)] * counts[-1])
    clippers = {
        n: distclip.GradClipper(problems.named(params), 1e9, groups=Blocks(n)) for n in counts
    }
    times = interleaved(
        [Contender(str(n), clipper.clip_) for n, clipper in clippers.items()], effort
    )
    rows = [
        figure(
            f"{n:,} groups of {counts[-1]:,} parameters of 100 elements, idle",
            times[str(n)],
            times["1"],
            kernels,
        )
        for n in counts[1:]
    ]
    what = f"{shared['groups']:,} groups, GPT-2's elements in as many sharded tensors, idle"
    rows.append(
        figure(
            what,
            shared["many"],
            shared["one"],
            kernels,
            ranks,
            **ceiling("10,000 groups on 4", kernels),
        )
    )
    return rows


def figure(
    what: str, many: list[float], one: list[float], kernels: str, ranks: int = 1, **limit: Any
) -> Row:
    cost = Spread.of([a / b for a, b in zip(many, one, strict=True)])
    return Row(
        "groups", what, cost, "times one group", "GradClipper.clip_", "one group", Spread.of(one), Spread.of(many),
        kernels=kernels, ranks=ranks, **limit,
    )  # fmt: skip


def on_ranks(count: int, effort: Effort) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params: list[torch.nn.Parameter] = []
    for shape in split_gpt2(count, effort.quick):
        rows, rest = -(-shape[0] // dist.get_world_size()), shape[1:]
        mine = max(0, min(rows, shape[0] - rows * dist.get_rank()))
        stride = torch.empty(shape, device="meta").stride()
        zeros, ones = (
            DTensor.from_local(
                torch.full((mine, *rest), v),
                mesh,
                [Shard(0)],
                run_check=False,
                shape=torch.Size(shape),
                stride=stride,
            )
            for v in (0.0, 1e-4)
        )
        params.append(torch.nn.Parameter(zeros))
        params[-1].grad = ones
    one = distclip.GradClipper(problems.named(params), 1e9)
    many = distclip.GradClipper(problems.named(params), 1e9, groups=distclip.per_parameter())
    times = in_turns({"one": one.clip_, "many": many.clip_}, effort)["wall"]
    return times | {"groups": len(many.plan.groups)}
