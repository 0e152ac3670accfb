"""What it costs to see more than the norm: each rank's own norm, and a step that is watched."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import distclip
from benchmarks import problems
from benchmarks.records import Row
from benchmarks.single import rows_of
from benchmarks.timing import Contender, Effort, interleaved
from distclip.kernels.tensor_list import TensorList
from distclip.p_norm import p_norm

READ, BY_RANK = "one read of the gradients", "RankNorms"
PLAIN, WATCHED = "step", "step, watched, with a note and a ladder"
NOTE = {"file": "shard-00017.bin", "samples": list(range(16))}
LAYERS, EACH = 100, 10


def watching(effort: Effort, kernels: str) -> list[Row]:
    return [*by_rank(effort, kernels), *watched(effort, kernels)]


def by_rank(effort: Effort, kernels: str) -> list[Row]:
    """What RankNorms does at DDP's buckets, beside one read of the same gradients."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        params = problems.parameters(problems.gpt2(effort.quick))
        model, buckets = _Sum(params), {}

        def keep(state, bucket):
            buckets[bucket.index()] = bucket.buffer().clone()
            return allreduce_hook(None, bucket)

        wrapped = DistributedDataParallel(model)
        rank_norms = distclip.RankNorms(wrapped, comm_hook=(None, keep))
        for _ in range(2):  # buckets are made anew after the first
            buckets.clear()
            wrapped().backward()
        grads = [p.grad for p in params if p.grad is not None]
        size, read = sum(g.numel() for g in grads), sum(b.numel() for b in buckets.values())
        assert size == read, (size, read)
        norm, here = p_norm(2.0), torch.device("cpu")

        def see() -> None:
            for index, buffer in buckets.items():
                rank_norms._see(index, buffer, 1.0)
            rank_norms.take(norm, here, 1.0)

        times = interleaved(
            [
                Contender(READ, lambda: TensorList.of(grads).power_sums(2.0)),
                Contender(BY_RANK, see),
            ],
            effort,
        )
    finally:
        dist.destroy_process_group()
    what = f"GPT-2's shapes in {len(buckets)} buckets"
    return rows_of("watching", what, times, [(READ, BY_RANK)], kernels, "watching ranks")


class _Sum(nn.Module):
    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__()
        self.params = nn.ParameterList(params)

    def forward(self) -> torch.Tensor:
        return torch.stack([p.sum() for p in self.params]).sum()


def watched(effort: Effort, kernels: str) -> list[Row]:
    """1,000 parameters in 100 layers: clip and a fused AdamW step, with and without.
    Nothing is sent of the notes where no step matters."""
    runs: list[Contender] = []
    for name in (PLAIN, WATCHED):
        params = problems.parameters([(256, 64)] * (LAYERS * EACH))
        named = [(f"layer{i // EACH}.p{i % EACH}", p) for i, p in enumerate(params)]
        optimizer = torch.optim.AdamW(params, 1e-4, fused=True)
        policy: distclip.Policy = distclip.FixedNorm(1e9)
        more = {}
        if name == WATCHED:
            policy = distclip.Escalate(policy)
            more = {"watch": distclip.Watch(distclip.per_layer(), every=100)}
        clipper = distclip.GradClipper(named, policy=policy, **more)
        note = NOTE if name == WATCHED else None
        runs.append(Contender(name, lambda c=clipper, o=optimizer, n=note: c.step(o, note=n)))
    times = interleaved(runs, effort)
    return rows_of(
        "watching", "1,000 parameters", times, [(PLAIN, WATCHED)], kernels, "watching step"
    )
