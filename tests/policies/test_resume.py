"""Saved on four ranks under FSDP2 and resumed on other ranks and shardings, a run of real gradients
goes on bit for bit."""

import os
import warnings
from zlib import crc32

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
import skips
from distclip import kernels
from distclip.testing import World, count_collectives, fully_shard
from parity.layouts import mesh
from parity.oracle import total_norm

SHAPES = {
    "first.weight": (24, 10),
    "first.bias": (7,),
    "second.weight": (16, 130),
    "second.bias": (3,),
}
STEPS, HALF = 24, 11
SPIKES = {5: 30.0, 13: 12.0, 18: 40.0}
# gradients of an earlier step: norms that differ in no bit, on any sharding
AGAIN = {12: 9, 15: 8, 16: 10, 17: 4, 22: 20}
POLICIES = {
    "fixed": lambda: distclip.FixedNorm(50.0),
    "value": lambda: distclip.FixedValue(4.0),
    "normalize": lambda: distclip.Normalize(3.0),
    "scheduled": lambda: distclip.Scheduled(((0, 70.0), (12, 20.0))),
    "autoclip": lambda: distclip.AutoClip(50.0, window=5),
    "autoclip, the smallest": lambda: distclip.AutoClip(0.0, window=6),
    "autoclip, the largest": lambda: distclip.AutoClip(100.0, window=4),
    "zclip": lambda: distclip.ZClip(z_threshold=1.5, warmup=3),
    "adagc": lambda: distclip.AdaGC(warmup=3, lambda_abs=30.0),
    "agc": lambda: distclip.AGC(2.5),
    "skip spikes": lambda: distclip.SkipSpikes(
        distclip.AutoClip(50.0, window=3), window=6, warmup=4, sigma=3.0
    ),
    "warmup": lambda: distclip.Warmup(distclip.ZClip(z_threshold=1.5, warmup=2), 4, 30.0),
    "escalate": lambda: distclip.Escalate(
        distclip.AutoClip(50.0, window=3), window=6, warmup=4, sigma=3.0, history=8
    ),
    "wrapped": lambda: distclip.SkipSpikes(
        distclip.Warmup(distclip.AutoClip(40.0), 14, 25.0), window=6, warmup=4, sigma=3.0
    ),
}


def drawn(name, step=None):
    """A weight; or its gradient at a step: real numbers, a few of them large."""
    step = AGAIN.get(step, step)
    source = torch.Generator().manual_seed(crc32(f"{name} {step}".encode()))
    values = torch.randn(SHAPES[name], generator=source)
    if step is None:
        return values
    sizes = torch.Generator().manual_seed(step)
    return values * (0.5 + torch.rand((), generator=sizes)) * SPIKES.get(step, 1.0)


class PolicyAssignment(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(drawn(f"{name}.{kind}")) for kind in ("weight", "bias")
        )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = PolicyAssignment("first"), PolicyAssignment("second")


def fsdp2(over):
    net = Net()
    fully_shard(net.first, mesh=over)
    return fully_shard(net, mesh=over)


def columns():
    """Weights along their second dimension, so that rows are cut."""
    net, over = Net(), mesh(dist.get_world_size())
    for part in (net.first, net.second):
        for name, p in list(part.named_parameters()):
            setattr(
                part,
                name,
                nn.Parameter(
                    distribute_tensor(p.detach(), over, [Shard(p.ndim - 1)], src_data_rank=None)
                ),
            )
    return net


LAYOUTS = {
    "fsdp2": lambda: fsdp2(mesh(4)),
    "hsdp": lambda: fsdp2(mesh(2, 2)),
    "tp": columns,
    "ddp": lambda: DDP(Net()),
    "one process": Net,
}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def bits(tensor):
    return crc32(whole(tensor).contiguous().numpy().tobytes())


@skips.told(0)
def run(layout, name, folder, start, stop, choice=None):
    """For each of these steps: all that is reported, and hashes of the bits of the clipped
    gradients and of the state."""
    if choice is not None:
        os.environ[kernels.CHOICE] = choice
    try:
        return steps(layout, name, folder, start, stop)
    finally:
        if choice is not None:
            del os.environ[kernels.CHOICE]


def steps(layout, name, folder, start, stop):
    net = LAYOUTS[layout]()
    params = {n.removeprefix("module."): p for n, p in net.named_parameters()}
    clipper = distclip.GradClipper(net, policy=POLICIES[name](), groups=distclip.per_layer())
    if start:
        with warnings.catch_warnings():
            # said of one process
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load({"clipper": clipper}, checkpoint_id=folder)
    rows = []
    for step in range(start, stop):
        for n, p in params.items():
            grad = drawn(n, step)
            p.grad = (
                distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
                if isinstance(p, DTensor)
                else grad
            )
        with count_collectives() as seen, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "value clipping turned the gradient")
            report = clipper.clip_()
        assert seen.names == ["allreduce_"] * dist.is_initialized(), "one message a step"
        numbers = [
            *report.threshold,
            *report.coefs,
            *report.group_norms,
            report.total_norm,
            report.norm_after,
            *report.cosine,
        ]
        flags = [bool(report.clipped), bool(report.skipped), report.step]
        hashes = [p.grad is None or bits(p.grad) for p in params.values()]
        hashes += [
            bits(value)
            for value in clipper.state_dict().values()
            if isinstance(value, torch.Tensor)
        ]
        rows.append((*map(float, numbers), *flags, *hashes))
    if folder and not start:
        dcp.save({"clipper": clipper}, checkpoint_id=folder)
    return rows


THRESHOLDS, TOTAL, CLIPPED, SKIPPED = slice(0, 2), 6, 10, 11  # columns of a row

native = pytest.mark.skipif(
    kernels.active() != "native",
    reason="torch's operations are right to 2e-7, and bits depend on the sharding",
)


def not_vacuous(name, rows):
    for step, row in enumerate(rows):
        assert row[TOTAL] == pytest.approx(total_norm([drawn(n, step) for n in SHAPES]), rel=1e-7)
    clipped = {row[CLIPPED] for row in rows}
    assert clipped == {"normalize": {True}, "autoclip, the largest": {False}}.get(
        name, {True, False}
    ), "vacuous"
    assert len({row[THRESHOLDS] for row in rows}) > 3 or name in (
        "fixed",
        "value",
        "normalize",
        "agc",
    ), "vacuous"
    assert any(row[SKIPPED] for row in rows) == (name in ("skip spikes", "wrapped", "escalate")), (
        "vacuous"
    )


@native
@pytest.mark.parametrize("name", POLICIES)
def test_a_run_goes_on_bit_for_bit(ranks, name, tmp_path, two_ranks):
    folder = str(tmp_path / "run")
    ((want,), *others) = [
        {tuple(rows) for rows in ranks.run(run, layout, name, None, 0, STEPS)}
        for layout in ("fsdp2", "hsdp", "tp")
    ]
    not_vacuous(name, want)
    assert others == [{want}] * 2, "the same on all ranks and shardings"
    assert {tuple(rows) for rows in ranks.run(run, "fsdp2", name, folder, 0, HALF)} == {want[:HALF]}
    for layout in ("ddp", "tp"):
        assert {tuple(rows) for rows in two_ranks.run(run, layout, name, folder, HALF, STEPS)} == {
            want[HALF:]
        }, layout
    assert tuple(run("one process", name, folder, HALF, STEPS)) == want[HALF:]


@pytest.mark.parametrize(
    "name", ["value", "normalize", "autoclip", "zclip", "adagc", "agc", "wrapped"]
)
def test_by_torchs_operations_alone_it_goes_on_to_their_precision(ranks, name, tmp_path, two_ranks):
    """Norms right to 2e-7, so thresholds too; whether a norm that equals its threshold is clipped
    is not promised there."""
    folder = str(tmp_path / "run")
    want = tuple(ranks.run(run, "fsdp2", name, None, 0, STEPS, "torch")[0])
    not_vacuous(name, want)
    ranks.run(run, "fsdp2", name, folder, 0, HALF, "torch")
    rows = two_ranks.run(run, "ddp", name, folder, HALF, STEPS, "torch")
    assert rows[0] == rows[1], "the same bits on all ranks, whatever the kernels"
    for row, other in zip(rows[0], want[HALF:], strict=True):
        assert row[:CLIPPED] == pytest.approx(other[:CLIPPED], rel=1e-6)


@pytest.fixture(scope="module")
def two_ranks():
    with World(2) as world:
        yield world
