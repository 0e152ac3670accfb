"""On a CUDA device: the kernels as they are, steps that wait for nothing, captured graphs, NCCL.
`pytest -m gpu` runs these alone."""

import math
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
import skips
from distclip.kernels import triton_lists
from distclip.kernels.reference import power_sums
from distclip.kernels.tensor_list import TensorList

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
KERNELS = pytest.mark.skipif(not triton_lists.has_triton(), reason="triton is not installed")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COUNTS = (0, 1, 7, 2047, 2049, 32768, 32769, 1_000_003)


@contextmanager
def nothing_waits():
    """Any operation of torch that makes the host wait for the device is an error."""
    with warnings.catch_warnings():
        # torch says once that it does not know of all such operations
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def numbers(count, dtype, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lists():
    """Mixed dtypes and sizes, aligned and not: on the CPU, and on the device with the same distance
    from 16 bytes."""
    here = [
        numbers(count + 1, dtype, count)[offset : count + offset]
        for count in COUNTS
        for dtype in DTYPES
        for offset in (0, 1)
    ]
    there = []
    for tensor in here:
        offset = tensor.storage_offset()
        there.append(
            torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")[
                offset : tensor.numel() + offset
            ].copy_(tensor)
        )
    return here, there


def test_the_guard_catches_a_wait():
    with pytest.raises(RuntimeError, match="synchronizing"), nothing_waits():
        torch.ones((), device="cuda").item()


@KERNELS
@pytest.mark.parametrize("p", [2.0, math.inf, 1.0, 0.5, 3.0, 2.5, 8.0])
def test_power_sums_are_those_of_the_cpu(p):
    here, there = lists()
    found = TensorList.of(there).power_sums(p)
    assert found.device.type == "cuda" and torch.equal(found, TensorList.of(there).power_sums(p)), (
        "the same bits each time"
    )
    torch.testing.assert_close(
        found.cpu(), power_sums([t.double() for t in here], p), rtol=1e-12, atol=0
    )


@KERNELS
@pytest.mark.parametrize("p", [2.0, math.inf])
def test_extreme_sizes_inf_and_nan(p):
    values = ([1e20] * 5, [1e-25] * 5, [math.inf, 1.0], [math.nan, math.inf], [1e-45])
    found = TensorList.of([torch.tensor(v, device="cuda") for v in values]).power_sums(p).tolist()
    expected = power_sums(
        [torch.tensor(v, dtype=torch.float32).double() for v in values], p
    ).tolist()
    assert found == pytest.approx(expected, rel=1e-13, nan_ok=True)


def multiplied(tensor, factor):
    """In float32 (float64), then rounded. A 0-dim factor on the device would be rounded to bfloat16
    by torch before the multiply."""
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return (tensor.to(wide) * torch.tensor(factor, dtype=wide, device="cuda")).to(tensor.dtype)


@pytest.mark.parametrize("choice", ["", "torch"])
@pytest.mark.parametrize("factor", [1 / 3, 1e-7, 1e-30, 1.0])
def test_scaling_is_done_in_float32(monkeypatch, choice, factor):
    monkeypatch.setenv("DISTCLIP_KERNELS", choice)
    _, there = lists()
    want = [multiplied(t, factor) for t in there]
    TensorList.of(there).scale_(
        torch.full((len(there),), factor, dtype=torch.float64, device="cuda")
    )
    assert all(torch.equal(a, b) for a, b in zip(there, want, strict=True))


@KERNELS
@pytest.mark.parametrize("double", [True, False])
def test_both_ways_of_squaring(monkeypatch, double):
    """Each device has one of its own; both are right on it."""
    monkeypatch.setattr(triton_lists, "has_fast_float64", lambda device: double)
    triton_lists.plan_for.cache_clear()
    here, there = lists()
    shifted = [t * 2.0**-70 for t in there if t.dtype != torch.float16] + [
        torch.zeros(100_000, device="cuda")
    ]
    try:
        found, tiny = TensorList.of(there).power_sums(2.0), TensorList.of(shifted).power_sums(2.0)
    finally:
        triton_lists.plan_for.cache_clear()
    torch.testing.assert_close(
        found.cpu(), power_sums([t.double() for t in here], 2.0), rtol=1e-13, atol=0
    )
    torch.testing.assert_close(
        tiny.cpu(), power_sums([t.double().cpu() for t in shifted], 2.0), rtol=1e-13, atol=0
    )


@KERNELS
def test_later_launches_are_those_of_other_arguments_too():
    """What was compiled once is launched with whatever comes: other lengths of a list, other
    strides, other orders."""
    for count in (1, 5, 3):
        tensors = [torch.full((1000 + i,), 2.0, device="cuda") for i in range(count)]
        many = torch.tensor([[0.5, 9.0]] * count, dtype=torch.float64, device="cuda")
        for factors, left in (
            (many[:, 0], 1.0),
            (many[0, 0], 0.5),
            (many[:1, 0].expand(count), 0.25),
            (many[:, 0].float(), 0.125),
        ):
            TensorList.of(tensors).scale_(factors)
            assert all(bool((t == left).all()) for t in tensors)
        for p, each in ((1.0, 0.125), (2.0, 0.125**2), (1.0, 0.125)):
            assert TensorList.of(tensors).power_sums(p).tolist() == [
                each * (1000 + i) for i in range(count)
            ]


@KERNELS
def test_clamping():
    _, there = lists()
    want = [t.clamp(-0.5, 0.5) for t in there]
    TensorList.of(there).clamp_(torch.full((len(there),), 0.5, dtype=torch.float64, device="cuda"))
    assert all(torch.equal(a, b) for a, b in zip(there, want, strict=True))


@KERNELS
def test_new_addresses_wait_for_nothing_and_overwrite_none_that_are_on_their_way():
    half = torch.full((2,), 0.5, dtype=torch.float64, device="cuda")
    many = [[torch.ones(1000, device="cuda"), torch.ones(5, device="cuda")] for _ in range(40)]
    TensorList.of(many[0]).scale_(half)
    torch.cuda.synchronize()
    with nothing_waits():
        torch.cuda._sleep(200_000_000)  # about 0.1 s, in which the host sends all that follows
        for tensors in many[1:]:
            TensorList.of(tensors).scale_(half)
        sums = [TensorList.of(tensors).power_sums(1.0) for tensors in many]
    assert [s.tolist() for s in sums] == [[500.0, 2.5]] * len(many)


@KERNELS
def test_more_than_2_to_the_31_elements():
    count = (1 << 31) + 100
    if torch.cuda.mem_get_info()[0] < 3 * count:
        pytest.skip("too little memory on the device")
    tensor = torch.zeros(count, dtype=torch.float16, device="cuda")
    tensor[-100:] = 2.0
    assert TensorList.of([tensor]).power_sums(2.0).item() == 400
    TensorList.of([tensor]).scale_(0.5)
    assert (
        TensorList.of([tensor]).power_sums(2.0).item() == 100
        and tensor[-100:].tolist() == [1.0] * 100
    )


def model(device, dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.Linear(30, 10)).to(device, dtype)
    for p in layers.parameters():
        p.grad = torch.zeros_like(p)
    return layers


SIZES = (0.01, 30.0, 1.0, 200.0, 0.5, 50.0)  # below and above max_norm


def give(layers, step, bad=False):
    """Gradients of one step, into the tensors that are there."""
    draw = torch.Generator().manual_seed(step)
    for p in layers.parameters():
        grad = torch.randn(p.shape, generator=draw) * SIZES[step % len(SIZES)] / 30
        p.grad.copy_(grad)
    if bad:
        layers[2].weight.grad[3, 4] = math.nan


def optimizer_of(layers, capturable=False):
    return torch.optim.AdamW(layers.parameters(), 0.01, fused=True, capturable=capturable)


POLICIES = {
    "autoclip": lambda: distclip.AutoClip(60.0, window=4),
    "spikes": lambda: distclip.SkipSpikes(
        distclip.FixedNorm(1.0), sigma=1.0, window=4, warmup=2, factor=1.0
    ),
    "warmup": lambda: distclip.Warmup(distclip.FixedNorm(1.0), 4, 3.0),
    "fixed": lambda: distclip.FixedNorm(1.0),
    "zclip": lambda: distclip.ZClip(warmup=2),
    "value": lambda: distclip.FixedValue(12.0),
}


@pytest.mark.parametrize("policy", ["fixed", "zclip", "value"])
@pytest.mark.parametrize(
    "mode",
    [
        {"on_nonfinite": "skip"},
        {"on_nonfinite": "propagate"},
        {"on_nonfinite": "propagate", "fold": "never"},
    ],
)
def test_steps_wait_for_nothing_and_do_what_they_do_on_the_cpu(policy, mode):
    if policy == "value" and mode["on_nonfinite"] == "skip":
        pytest.skip("a clamp does not fold, so one flag is read")
    runs = []
    for device in ("cpu", "cuda"):
        layers = model(device)
        clipper, optimizer = (
            distclip.GradClipper(layers, policy=POLICIES[policy](), **mode),
            optimizer_of(layers),
        )
        reports = []
        for step in range(6):
            give(layers, step)
            torch.cuda.synchronize()
            if device == "cuda" and step:
                with nothing_waits():
                    reports.append(clipper.step(optimizer))
            else:
                reports.append(clipper.step(optimizer))
        runs.append(
            (
                [float(r.total_norm) for r in reports],
                [bool(r.clipped) for r in reports],
                [p.cpu() for p in layers.parameters()],
            )
        )
    (norms, clipped, params), (norms_there, clipped_there, params_there) = runs
    assert (
        norms == pytest.approx(norms_there, rel=1e-6)
        and clipped == clipped_there
        and len(set(clipped)) == 2
    )
    for a, b in zip(params, params_there, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_the_host_decides_by_itself_is_what_the_cpu_does():
    """`clip_` with a constant threshold, a bad step among the calls, and a step that folds after
    them: the counters go to the device then."""
    runs = []
    for device in ("cpu", "cuda"):
        layers, reports = model(device), []
        clipper = distclip.GradClipper(layers, 1.0)
        for step in range(6):
            give(layers, step)
            if step == 3:
                layers[2].weight.grad[3, 4] = math.nan
                with pytest.warns(RuntimeWarning, match="step 4 is skipped"):
                    reports.append(clipper.clip_())
                assert all(p.grad is None for p in layers.parameters())
                for p in layers.parameters():
                    p.grad = torch.zeros_like(p)
                continue
            reports.append(clipper.clip_())
            assert reports[-1].total_norm.device.type == device
        grads = [p.grad.cpu() for p in layers.parameters()]
        optimizer = optimizer_of(layers)
        reports.append(clipper.step(optimizer))
        clipper.measure()
        lines = [report.to_dict() for report in reports]
        runs.append((lines, grads, [p.detach().cpu() for p in layers.parameters()]))
    (lines, grads, params), (lines_there, grads_there, params_there) = runs
    for line, there in zip(lines, lines_there, strict=True):
        for name in ("total_norm", "norm_after", "clip_coef", "clip_rate"):
            assert there[name] == pytest.approx(line[name], rel=1e-6, nan_ok=True), name
        assert [there[n] for n in ("skipped", "skips")] == [line[n] for n in ("skipped", "skips")]
    for a, b in zip([*grads, *params], [*grads_there, *params_there], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_step_with_a_scaler_waits_for_nothing():
    layers = model("cuda")
    clipper, optimizer, scaler = (
        distclip.GradClipper(layers, 1.0),
        optimizer_of(layers),
        torch.amp.GradScaler("cuda", init_scale=4.0),
    )
    start = deepcopy(layers.state_dict())
    for step in range(4):
        give(layers, step, bad=step == 3)
        scaler.scale(torch.ones((), device="cuda"))
        torch.cuda.synchronize()
        if step == 3:
            start = deepcopy(layers.state_dict())
        with nothing_waits() if step else warnings.catch_warnings():
            report = clipper.step(optimizer, scaler=scaler)
    assert report.skipped and scaler.get_scale() == 2.0
    assert all(
        torch.equal(a, b) for a, b in zip(start.values(), layers.state_dict().values(), strict=True)
    )


@KERNELS
@pytest.mark.filterwarnings(skips.IGNORED)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"max_norm": 1.0},
        {"max_norm": 1.0, "norm_type": math.inf},
        {"max_norm": 1.0, "norm_type": 1.0},
        {"max_norm": 1.0, "groups": distclip.per_parameter()},
        {
            "max_norm": 1.0,
            "groups": distclip.per_parameter(),
            "watch": distclip.Watch(distclip.per_layer()),
        },
        {"policy": distclip.ZClip(warmup=2)},
    ],
    ids=["norm", "inf", "one", "groups", "watched", "zclip"],
)
def test_the_kernels_of_a_steps_numbers_give_torchs_bits(monkeypatch, options, scaled):
    """Reports, parameters and counters of steps with a bad one among them, and of `measure`."""
    runs = []
    for choice in ("", "torch"):
        monkeypatch.setenv("DISTCLIP_KERNELS", choice)
        layers = model("cuda")
        clipper, optimizer = distclip.GradClipper(layers, **options), optimizer_of(layers)
        assert (clipper._stages.layout._packer is None) == (choice == "torch")
        # sums of elements are another order of adding there: those of torch for both
        monkeypatch.setattr(
            TensorList, "power_sums", lambda own, p, out=None: power_sums(own.tensors, p)
        )
        scaler = torch.amp.GradScaler("cuda", init_scale=8.0) if scaled else None
        reports = []
        for step in range(7):
            if scaled:
                scaler.scale(torch.ones((), device="cuda"))
            give(layers, step, bad=step == 4)
            reports.append(clipper.step(optimizer, scaler=scaler))
            if step == 5:
                reports.append(clipper.measure())
        runs.append(
            (
                [repr(report.to_dict()) for report in reports],
                [p.cpu() for p in layers.parameters()],
                {name: repr(value) for name, value in clipper.state_dict().items()},
            )
        )
    (reports, params, state), (others, theirs, their_state) = runs
    assert reports == others and state == their_state
    assert all(torch.equal(a, b) for a, b in zip(params, theirs, strict=True))
    assert clipper._state.history.num_skips.item() == 1


@KERNELS
def test_a_deep_copy_after_a_step_that_is_judged_late():
    layers = model("cuda")
    clipper, optimizer = distclip.GradClipper(layers, 1.0), optimizer_of(layers)
    give(layers, 1)
    clipper.step(optimizer)
    others, other = deepcopy((layers, clipper))
    give(others, 1)
    assert float(other.clip_().total_norm) == pytest.approx(float(clipper.last_report.total_norm))
    clipper.measure()


@pytest.mark.filterwarnings(skips.IGNORED)
@pytest.mark.parametrize("policy", ["fixed", "zclip", "autoclip", "spikes", "warmup"])
def test_a_captured_graph_does_what_the_steps_do(policy):
    """Replays with other gradients in the same tensors, one of them not finite; the policy's state
    goes on from replay to replay."""
    warm_up, bad = 3, 5
    layers, reference = model("cuda"), model("cpu")
    clipper, optimizer = (
        distclip.GradClipper(layers, policy=POLICIES[policy]()),
        optimizer_of(layers, capturable=True),
    )
    other, steps = (
        distclip.GradClipper(reference, policy=POLICIES[policy]()),
        optimizer_of(reference),
    )
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(warm_up):
            give(layers, step)
            clipper.step(optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report = clipper.step(optimizer)

    skipped = []
    for step in range(8):
        give(reference, step, bad=step == bad)
        expected = other.step(steps)
        if step >= warm_up:
            give(layers, step, bad=step == bad)
            graph.replay()
            torch.cuda.synchronize()
            assert float(report.total_norm) == pytest.approx(
                float(expected.total_norm), rel=1e-6, nan_ok=True
            )
            assert bool(report.clipped) == bool(expected.clipped)
            skipped.append(bool(report.skipped))
            assert skipped[-1] == bool(expected.skipped)
    assert skipped[bad - warm_up] and (
        policy == "spikes" or skipped == [step == bad for step in range(warm_up, 8)]
    )
    for a, b in zip(layers.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-6)
    give(layers, 0)
    assert clipper.step(optimizer).step > warm_up, "it goes on without the graph"


def inputs(step, bad=False):
    x = (
        torch.randn(8, 20, generator=torch.Generator().manual_seed(100 + step))
        * SIZES[step % len(SIZES)]
    )
    if bad:
        x[1, 2] = math.inf
    return x


def trained(layers, clipper, optimizer, x):
    optimizer.zero_grad(set_to_none=True)
    layers(x).square().mean().backward()
    return clipper.step(optimizer)


@pytest.mark.filterwarnings(skips.IGNORED)
@pytest.mark.parametrize("policy", ["fixed", "zclip"])
def test_a_whole_training_step_is_captured(policy):
    """Forward, backward and step in one graph: the gradients lie where the capture made them. A bad
    input among the replays."""
    warm_up, bad = 3, 5
    layers, reference = model("cuda"), model("cpu")
    clipper, optimizer = (
        distclip.GradClipper(layers, policy=POLICIES[policy]()),
        optimizer_of(layers, capturable=True),
    )
    other, steps = (
        distclip.GradClipper(reference, policy=POLICIES[policy]()),
        optimizer_of(reference),
    )
    x = inputs(0).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(warm_up):
            x.copy_(inputs(step))
            trained(layers, clipper, optimizer, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        report = trained(layers, clipper, optimizer, x)

    clipped = []
    for step in range(9):
        expected = trained(reference, other, steps, inputs(step, step == bad))
        if step < warm_up:
            continue
        x.copy_(inputs(step, step == bad))
        graph.replay()
        torch.cuda.synchronize()
        assert bool(report.skipped) == bool(expected.skipped) == (step == bad)
        assert bool(report.clipped) == bool(expected.clipped)
        if step != bad:
            assert float(report.total_norm) == pytest.approx(float(expected.total_norm), rel=1e-4)
        clipped.append(bool(report.clipped))
    assert True in clipped or policy == "zclip"
    for a, b in zip(layers.parameters(), reference.parameters(), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-5)


COMMUNICATORS = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
import distclip

log = Path(os.environ["NCCL_DEBUG_FILE"])
count = lambda: log.read_text().count("Init COMPLETE") if log.exists() else 0
dist.init_process_group("nccl", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
model = torch.nn.Linear(4, 4).cuda()
clipper = distclip.GradClipper(model, 1.0)
built = count()
for _ in range(2):
    model.weight.grad, model.bias.grad = torch.ones_like(model.weight), torch.ones_like(model.bias)
    clipper.clip_()
torch.cuda.synchronize()
print(built, count(), len(dist.distributed_c10d._world.pg_map))
dist.destroy_process_group()
"""


def test_the_first_clip_opens_no_communicator(tmp_path):
    """All are opened when the clipper is built, before the step of the largest memory. One rank: as
    far as that shows it."""
    environment = os.environ | {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(tmp_path / "nccl.txt")}
    command = [sys.executable, "-c", COMMUNICATORS, str(tmp_path / "store")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    built, after, groups = map(int, done.stdout.split())
    assert built == after == 1 and groups == 1, "NCCL's log counts what was opened"


@pytest.fixture
def nccl(tmp_path):
    dist.init_process_group(
        "nccl",
        init_method=f"file://{tmp_path}/store",
        rank=0,
        world_size=1,
        device_id=torch.device("cuda", 0),
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_nccl_on_one_gpu(nccl, device):
    """Gradients on the device, and offloaded ones."""
    layers = model(device)
    clipper, optimizer = distclip.GradClipper(layers, 1.0), optimizer_of(layers)
    for step in range(3):
        give(layers, step)
        norm = float(power_sums([p.grad for p in layers.parameters()], 2.0).sum().sqrt())
        torch.cuda.synchronize()
        with nothing_waits() if step and device == "cuda" else warnings.catch_warnings():
            report = clipper.step(optimizer)
        assert float(report.total_norm) == pytest.approx(norm, rel=1e-6) and not report.skipped
    assert report.total_norm.device.type == device
    clipper.audit()


def test_the_scale_of_offloaded_gradients_is_read_when_it_is_there():
    layers = model("cpu")
    clipper, optimizer, scaler = (
        distclip.GradClipper(layers, 1000.0),
        optimizer_of(layers),
        torch.amp.GradScaler("cuda", init_scale=8.0),
    )
    scaler.scale(torch.ones((), device="cuda"))
    give(layers, 1)
    norm = float(power_sums([p.grad for p in layers.parameters()], 2.0).sum().sqrt())
    torch.cuda._sleep(200_000_000)
    scaler._scale.mul_(2)
    assert float(clipper.step(optimizer, scaler=scaler).total_norm) == pytest.approx(
        norm / 16, rel=1e-6
    )


@KERNELS
def test_what_a_capture_needs_is_prepared_before():
    tensors = [torch.ones(3, device="cuda"), torch.ones(12_345, device="cuda")]
    with (
        pytest.raises(distclip.ConfigError, match="run the step without capture first"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        torch.zeros(1, device="cuda")  # torch warns of a graph that is empty
        TensorList.of(tensors).power_sums(2.0)


@KERNELS
def test_captured_kernels_find_their_tensors():
    """Those of the warm-up, and others that were made in the capture."""
    half = torch.full((2,), 0.5, dtype=torch.float64, device="cuda")
    old = [torch.ones(40_000, device="cuda"), torch.ones(3, dtype=torch.bfloat16, device="cuda")]
    TensorList.of(old).scale_(half)
    TensorList.of(old).power_sums(1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        new = [
            torch.full((40_000,), 8.0, device="cuda"),
            torch.full((3,), 8.0, dtype=torch.bfloat16, device="cuda"),
        ]
        TensorList.of(new).scale_(half)
        TensorList.of(old).scale_(half)
        sums = TensorList.of(new).power_sums(1.0), TensorList.of(old).power_sums(1.0)
    for other in range(3):  # eager calls between the replays do not disturb them
        TensorList.of(
            [torch.ones(40_000, device="cuda"), torch.ones(3, dtype=torch.bfloat16, device="cuda")]
        ).scale_(half)
        graph.replay()
        torch.cuda.synchronize()
        assert sums[0].tolist() == [160_000.0, 12.0]
        assert sums[1].tolist() == [40_000 * 0.5 ** (other + 2), 3 * 0.5 ** (other + 2)]
