"""Gradients in another dtype than their parameters (`grad_dtype`), and in several dtypes within one
FSDP2 group (torch 2.15)."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip import versions
from distclip.testing import count_collectives, fully_shard
from parity.layouts import mesh
from parity.oracle import total_norm

pytestmark = pytest.mark.skipif(
    versions.is_before(2, 15), reason="torch < 2.15: FSDP2's gradients have one dtype in a group"
)
BF16, FP32 = torch.bfloat16, torch.float32
KINDS = {  # dtype of parameters; of gradients of weights and of biases
    "wide gradients": (BF16, FP32, FP32),
    "wide gradients of weights": (BF16, FP32, BF16),
    "narrow gradients of biases": (FP32, FP32, BF16),
}


def model(kind):
    torch.manual_seed(0)
    dtype, of_weights, of_biases = KINDS[kind]
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)
    for name, p in net.named_parameters():
        p.grad_dtype = of_weights if name.endswith("weight") else of_biases
    return net


def held(p):
    return p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad


def clipped(kind, on, act, p):
    """`on`: the shape of a mesh, or None for one process alone."""
    net = model(kind)
    if on:
        fully_shard(net, mesh=mesh(*on))
    rank = dist.get_rank() if on else 0
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(rank)).to(KINDS[kind][0])
    net(x).square().sum().backward()
    before = [held(param).clone() for param in net.parameters()]
    start = [param.detach().clone() for param in net.parameters()]
    want, threshold = total_norm(before, p), total_norm(before, p) / 4
    clipper = distclip.GradClipper(net, threshold, norm_type=p)
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    with count_collectives() as seen:
        report = clipper.step(optimizer) if act == "step" else clipper.clip_()
    pairs = [(held(param), old / 4) for param, old in zip(net.parameters(), before, strict=True)]
    scaled = all(
        torch.allclose(new, old, rtol=1e-6 if new.dtype == FP32 else 2**-8, atol=0)
        for new, old in pairs
    )
    after = [param.detach().full_tensor() if on else param.detach() for param in net.parameters()]
    first = [old.full_tensor() if on else old for old in start]
    moved = max(
        (a.float() - b.float() + held(q).float() / 2).abs().max().item()
        for a, b, q in zip(after, first, net.parameters())
    )
    return {
        "norm": report.total_norm.item(), "want": want, "clipped": bool(report.clipped), "scaled": scaled, "moved": moved,
        "dtypes": [held(param).dtype for param in net.parameters()], "names": seen.names,
    }  # fmt: skip


def check(row, kind, act, sends):
    assert row["dtypes"] == list(KINDS[kind][1:]) * 2, "vacuous: torch gave other dtypes"
    assert row["norm"] == pytest.approx(row["want"], rel=1e-6) and row["clipped"] and row["scaled"]
    assert row["names"] == ["allreduce_"] * sends
    if act == "step":
        assert row["moved"] < 0.02, "to bf16's rounding of the parameters"


@pytest.mark.parametrize("act", ["clip_", "step"])
@pytest.mark.parametrize("on", [(4,), (2, 2)], ids=["fsdp2", "hsdp"])
@pytest.mark.parametrize("kind", KINDS)
def test_sharded(ranks, kind, on, act):
    rows = ranks.run(clipped, kind, on, act, 2.0)
    for row in rows:
        check(row, kind, act, 1)
    assert len({row["norm"] for row in rows}) == 1


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_one_process(kind, p):
    check(clipped(kind, None, "clip_", p), kind, "clip_", 0)
    check(clipped(kind, None, "step", p), kind, "step", 0)
