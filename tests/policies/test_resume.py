"""Saved on four ranks under FSDP2 and resumed on two under DDP, a run goes on with the same thresholds, bit for bit."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
import skips
from distclip.testing import World
from parity.layouts import Pair

SIZES = [3, 5, 4, 6, 2, 40, 3, 5, 7, 90, 4, 3, 6, 5]  # of each step's gradient; whole numbers, so that sums of squares are exact
HALF = 7
POLICIES = {
    "autoclip": lambda: distclip.AutoClip(40.0, window=5),
    "zclip": lambda: distclip.ZClip(warmup=3),
    "adagc": lambda: distclip.AdaGC(warmup=3),
    "scheduled": lambda: distclip.Scheduled(((0, 500.0), (12, 20.0))),
    "wrapped": lambda: distclip.SkipSpikes(distclip.Warmup(distclip.ZClip(warmup=2), 4, 300.0), window=6, warmup=4),
}


@skips.told(0)
def run(layout, name, folder, start, stop):
    """Bits of thresholds, coefficients and skips of these steps."""
    model = Pair()
    if layout == "fsdp2":
        over = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.first, mesh=over)
        model = fully_shard(model, mesh=over)
    else:
        model = DDP(model)
    clipper = distclip.GradClipper(model, policy=POLICIES[name](), groups=distclip.per_layer())
    if start:
        dcp.load({"clipper": clipper}, checkpoint_id=folder)
    rows = []
    for size in SIZES[start:stop]:
        model.zero_grad()
        model(torch.tensor(float(size))).backward()
        report = clipper.clip_()
        rows.append([report.step, *(float(x).hex() for x in (*report.threshold, *report.coefs, report.total_norm)), bool(report.skipped)])
    if not start and stop == HALF:
        dcp.save({"clipper": clipper}, checkpoint_id=folder)
    return rows


@pytest.mark.parametrize("name", POLICIES)
def test_thresholds_go_on(ranks, name, tmp_path, two_ranks):
    folder = str(tmp_path / "run")
    whole = ranks.run(run, "fsdp2", name, folder + "whole", 0, len(SIZES))
    first = ranks.run(run, "fsdp2", name, folder, 0, HALF)
    second = two_ranks.run(run, "ddp", name, folder, HALF, len(SIZES))
    assert all(rows == whole[0] for rows in whole) and all(rows == whole[0][:HALF] for rows in first)
    assert all(rows == whole[0][HALF:] for rows in second)
    thresholds = {row[1] for row in whole[0]}
    assert len(thresholds) > 3, "vacuous"


@pytest.fixture(scope="module")
def two_ranks():
    with World(2) as world:
        yield world
