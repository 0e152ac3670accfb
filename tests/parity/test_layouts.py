"""In every layout and for every p: the oracle's norm, one collective, equal bits on all ranks, and
gradients = coefficient x before."""

import math
from collections import Counter

import pytest
import torch

import distclip
from distclip.testing import count_collectives
from parity.layouts import LAYOUTS
from parity.oracle import NORMS, total_norm


def local(t):
    return t.to_local() if hasattr(t, "to_local") else t


def own_grads(case):
    grad_of = case.options.get("grad_of", lambda p: p.grad)
    grads = {id(g): g for g in map(grad_of, case.parameters()) if g is not None}
    return [local(g) for g in grads.values()]


def clip_layout(name):
    case, rows = LAYOUTS[name](), []
    grads = own_grads(case)
    before = [g.clone() for g in grads]
    for p in NORMS:
        want = total_norm(case.want, p)
        clipper = (
            case.built[p]
            if case.built
            else distclip.GradClipper(case.params, max_norm=want / 2, norm_type=p, **case.options)
        )
        with count_collectives() as seen:
            report = clipper.clip_()
        coef = report.clip_coef.item()
        worst = max(
            (
                ((g.to_dense().double() - coef * b.to_dense().double()).abs() - tolerance(b))
                .max()
                .item()
                for g, b in zip(grads, before)
                if g.numel()
            ),
            default=0.0,
        )
        rows.append(
            (p, want, report.total_norm.item(), coef, worst, Counter(seen.names), str(clipper.plan))
        )
        for g, b in zip(grads, before):
            g.copy_(b)
    return rows


def tolerance(grad):
    rounding = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}.get(grad.dtype, 3e-7)
    return grad.to_dense().abs().double() * rounding + (
        2.0**-24 if grad.dtype == torch.float16 else 0
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(ranks, name):
    for rows in zip(*ranks.run(clip_layout, name)):
        for p, want, norm, coef, worst, seen, plan in rows:
            assert norm == pytest.approx(want, rel=1e-6), p
            assert norm > want / 2 > 0, "vacuous"
            assert coef == pytest.approx(0.5, rel=1e-6)
            assert worst <= 0, p
            assert seen == {"allreduce_": 1}, p
            assert "over ranks" in plan
        assert len({(norm.hex(), coef.hex()) for _, _, norm, coef, *_ in rows}) == 1


def one_local_clipper_per_rank():
    import torch.distributed as dist

    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.tensor([3.0, 4.0, 12.0]) * (dist.get_rank() + 1)
    with count_collectives() as seen:
        report = distclip.GradClipper([("own", param)], 1.0, process_group=distclip.LOCAL).clip_()
    return report.total_norm.item(), seen.names


def test_local_clippers_are_alone(ranks):
    assert ranks.run(one_local_clipper_per_rank) == [(13.0 * (r + 1), []) for r in range(4)]


def norm_of_shards(how):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from parity.layouts import mesh

    source = torch.Generator().manual_seed(5)
    whole = [torch.randn(shape, generator=source) for shape in ((257, 129), (1000,), (64, 640))]
    place = {"ddp": None, "fsdp2": [Shard(0)], "tp": [Shard(1)], "copies": [Replicate()]}[how]
    named = []
    for i, grad in enumerate(whole):
        zero = torch.zeros_like(grad)
        if place is not None:
            split = [Shard(0)] if grad.ndim == 1 and how == "tp" else place
            zero, grad = (
                distribute_tensor(t, mesh(4), split, src_data_rank=None) for t in (zero, grad)
            )
        param = torch.nn.Parameter(zero)
        param.grad = grad
        named.append((f"p{i}", param))
    return distclip.GradClipper(named, math.inf).measure().total_norm.item(), total_norm(whole)


@pytest.mark.parametrize("how", ["ddp", "fsdp2", "tp", "copies"])
def test_the_norm_does_not_depend_on_the_sharding(ranks, how):
    for norm, want in ranks.run(norm_of_shards, how):
        assert norm == pytest.approx(want, rel=2e-7)
