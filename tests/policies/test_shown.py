"""What policies are shown: norms and sums rounded so that no decision depends on the order in which
they were added up."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

import distclip
from distclip.testing import World
from parity.layouts import mesh
from parity.oracle import total_norm


class Shown:
    """Remembers what it is shown, clips nothing, and counts elements: held by three ranks, each
    adds a third of them."""

    num_stats = 1

    def init(self, groups, device):
        return tuple(
            torch.zeros(n, dtype=torch.float64, device=device) for n in (groups, 1, groups)
        )

    def local_stats(self, own):
        counts = torch.tensor([float(g.numel()) for g in own.grads.tensors], dtype=torch.float64)
        return own.reduced(counts.unsqueeze(1))

    def decide(self, norms, state):
        none = torch.full_like(norms.per_group, math.inf)
        return distclip.Scale(torch.ones_like(none), none), (
            norms.per_group,
            norms.total.reshape(1),
            norms.stats,
        )


def normal(name, dtype):
    return torch.randn(37, 41, dtype=dtype, generator=torch.Generator().manual_seed(len(name)))


def shown(dtypes, norm_type):
    """This rank's parameters are of these dtypes; norms that the policy saw, relative errors, and a
    report's."""
    named = []
    for i, (name, dtype) in enumerate(dtypes[dist.get_rank()].items()):
        grad = normal(name, dtype)
        param, grad = (
            distribute_tensor(t, mesh(4), [Shard(i % 2)], src_data_rank=None)
            for t in (torch.zeros_like(grad), grad)
        )
        named.append((name, nn.Parameter(param)))
        named[-1][1].grad = grad
    clipper = distclip.GradClipper(
        named, policy=Shown(), groups=distclip.per_parameter(), norm_type=norm_type
    )
    report = clipper.clip_()
    state = clipper.state_dict()
    whole = {name: normal(name, dtype).abs() for name, dtype in dtypes[dist.get_rank()].items()}
    want = [total_norm([whole[name]], norm_type) for name in report.groups] + [
        total_norm(whole.values(), norm_type)
    ]
    seen = [*state["0.0"].tolist(), *state["0.1"].tolist()]
    told = [*report.group_norms.tolist(), report.total_norm.item()]
    return (
        seen,
        [abs(a / b - 1) for a, b in zip(seen, want, strict=True)],
        told,
        report.total_norm.dtype,
    )


def spare_bits(values):
    """Of float64 numbers, how many of the last bits all of them leave at 0."""
    return min(
        (n & -n).bit_length() - 1
        for n in torch.tensor(values, dtype=torch.float64).view(torch.int64).tolist()
    )


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("wide", [None, torch.float64, torch.complex128])
def test_norms_of_the_precision_of_the_parameters(ranks, wide, norm_type):
    """24 bits; 48 where any parameter is double."""
    dtypes = {"a": torch.float32, "bb": torch.bfloat16, "ccc": wide or torch.float32}
    rows = ranks.run(shown, [dtypes] * 4, norm_type)
    for seen, off, told, dtype in rows:
        assert seen == told, "the report's norms are those that the policy saw"
        if wide is None:
            assert (
                spare_bits(seen) in range(29, 40)
                and 1e-9 < max(off) <= 2**-24
                and dtype == torch.float32
            )
        else:
            assert (
                spare_bits(seen) in range(5, 16)
                and 1e-16 < max(off) <= 2**-47
                and dtype == torch.float64
            )
    assert len({tuple(map(float.hex, row[0])) for row in rows}) == 1


def wide_on(rank):
    """One rank alone has a float64 parameter."""
    param = nn.Parameter(
        torch.zeros(3, dtype=torch.float64 if dist.get_rank() == rank else torch.float32)
    )
    param.grad = torch.full_like(param, 1 / 3)
    clipper = distclip.GradClipper(
        [(f"p{dist.get_rank()}", param)], policy=Shown(), groups=distclip.per_parameter()
    )
    clipper.clip_()
    return clipper.state_dict()["0.0"].tolist()


def test_all_ranks_round_alike(ranks):
    rows = ranks.run(wide_on, 2)
    assert all(row == rows[0] for row in rows) and 5 <= spare_bits(rows[0]) < 29


def counted():
    param = nn.Parameter(torch.zeros(7))
    param.grad = torch.ones(7)
    clipper = distclip.GradClipper([("w", param)], policy=Shown())
    clipper.clip_()
    return clipper.state_dict()["0.2"].tolist()


def test_counts_come_out_whole():
    assert sum([7 * (1 / 3)] * 3) != 7, "vacuous"
    with World(3) as world:
        assert world.run(counted) == [[7.0]] * 3


def bad(kind):
    """Norms of a step that is not finite, as policies see them; they never enter the state."""
    param = nn.Parameter(torch.zeros(4))
    param.grad = torch.ones(4)
    param.grad[1] = kind
    clipper = distclip.GradClipper([("w", param)], policy=Shown(), on_nonfinite="propagate")
    report = clipper.clip_()
    return report.total_norm.item(), int(report.nonfinite), clipper.state_dict()["0.0"].tolist()


@pytest.mark.parametrize("kind", [math.inf, math.nan])
def test_whether_a_norm_is_finite_is_read_before_it_is_rounded(ranks, kind):
    for norm, count, state in ranks.run(bad, kind):
        assert not math.isfinite(norm) and count == 4 and state == [0.0]
