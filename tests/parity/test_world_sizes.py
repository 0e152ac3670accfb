"""The same gradients over 1, 2, 4 and 8 ranks, copied or sharded: one norm, to 2e-7, and the same
bits on all ranks of a world."""

import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import distclip
from distclip.testing import World, count_collectives
from parity.oracle import NORMS, total_norm

HOW = ("ddp", "fsdp2", "tp")


def whole():
    source = torch.Generator().manual_seed(5)
    return [
        torch.randn(shape, generator=source) for shape in ((264, 136), (1000,), (64, 640), (3,))
    ]


def norms():
    """Of each way to hold them, for each p."""
    mesh, out = init_device_mesh("cpu", (dist.get_world_size(),)), []
    for how in HOW:
        named = []
        for i, grad in enumerate(whole()):
            zero = torch.zeros_like(grad)
            if how != "ddp":
                place = [Shard(0 if how == "fsdp2" or grad.ndim == 1 else 1)]
                zero, grad = (
                    distribute_tensor(t, mesh, place, src_data_rank=None) for t in (zero, grad)
                )
            param = nn.Parameter(zero)
            param.grad = grad
            named.append((f"p{i}", param))
        for p in NORMS:
            clipper = distclip.GradClipper(named, math.inf, norm_type=p)
            with count_collectives() as seen:
                out.append(clipper.clip_().total_norm.item())
            assert seen.names == ["allreduce_"]
    return out


@pytest.fixture(scope="module")
def by_size(ranks):
    found = {4: ranks.run(norms)}
    for size in (1, 2, 8):
        with World(size) as world:
            found[size] = world.run(norms)
    return found


def test_the_norm_does_not_depend_on_the_number_of_ranks(by_size):
    truth = [total_norm(whole(), p) for p in NORMS] * len(HOW)
    for size, rows in by_size.items():
        assert len(rows) == size and all(row == rows[0] for row in rows), (
            "the same bits on all ranks"
        )
        assert rows[0] == pytest.approx(truth, rel=1e-6)
        assert rows[0] == pytest.approx(by_size[1][0], rel=2e-7), size


def shrinking(store):
    """Four ranks build a clipper, two go on after the world was made anew: what they then clip, and
    the clipper's history."""
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    clipper = distclip.GradClipper([("w", p)], policy=distclip.AutoClip(50.0))
    clipper.clip_()
    rank = dist.get_rank()
    dist.barrier()
    dist.destroy_process_group()
    if rank >= 2:
        return None
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=2,
        store=dist.FileStore(store, 2),
        timeout=timedelta(seconds=300),
    )
    clipper.rebuild()
    p.grad = torch.tensor([6.0, 8.0])
    report = clipper.clip_()
    rows = (report.total_norm.item(), report.threshold.item(), clipper.plan.ranks, p.grad.tolist())
    dist.destroy_process_group()
    return rows


def test_the_world_may_shrink(tmp_path):
    with World(4) as world:
        rows = world.run(shrinking, str(tmp_path / "store"))
    assert rows[2:] == [None, None]
    for norm, threshold, over, grad in rows[:2]:
        assert (norm, threshold, over) == (10.0, 7.5, (0, 1)), (
            "the median of 5 and 10: the policy's state stays"
        )
        assert grad == pytest.approx([4.5, 6.0])
