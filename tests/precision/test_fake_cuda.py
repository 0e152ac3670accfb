"""Which copies between the host and a CUDA device a step makes, and what it reads: seen on fake
CUDA tensors, which need no device.

A copy to the device from ordinary host memory makes the host wait for all that the device has to
do. Values do not exist here, so whatever looks at one fails.
"""

import math
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.amp.grad_scaler import OptState
from torch.utils._python_dispatch import TorchDispatchMode

import distclip
from distclip import functional
from distclip.decide import fixed_on_device, state
from distclip.exchange import message
from distclip.exchange import readback as host
from distclip.kernels import triton_launch
from distclip.kernels.tensor_list import TensorList
from distclip.kernels.triton_lists import has_triton
from distclip.setup.parameters import ParamScan

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")
aten = torch.ops.aten
SOURCE = Path(distclip.__file__).parent


class Watched(TorchDispatchMode):
    """Collects "file: what happened" for copies between devices, and for reads and indices that
    wait for the device."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        source = (
            args[1]
            if func is aten.copy_.default
            else args[0]
            if args and isinstance(args[0], torch.Tensor)
            else None
        )
        target = (
            torch.device(kwargs["device"])
            if kwargs.get("device")
            else args[0].device
            if func is aten.copy_.default
            else None
        )
        if (
            func in (aten.copy_.default, aten._to_copy.default)
            and target is not None
            and target.type != source.device.type
        ):
            self.add(f"{source.device.type} to {target.type}")
        if (
            func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)
            and source.device.type == "cuda"
        ):
            self.add("read")
        if (
            func is aten.index.Tensor
            and source.device.type == "cuda"
            and any(i is not None and i.dtype == torch.bool for i in args[1])
        ):
            self.add("read")
        return func(*args, **kwargs)

    def add(self, what):
        own = [
            Path(frame.filename)
            for frame in traceback.extract_stack()
            if Path(frame.filename).is_relative_to(SOURCE)
        ]
        self.found.add(f"{own[-1].name}: {what}" if own else what)


@pytest.fixture
def fake(monkeypatch):
    """Fake CUDA tensors. A build of torch without CUDA refuses a few of Python's operators on them:
    they go to the dispatcher here."""

    def routed(name, on_cuda):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a: on_cuda(self, *a) if self.device.type == "cuda" else plain(self, *a),
        )

    def item(tensor, key):
        if isinstance(key, int):
            return aten.select.int(tensor, 0, key)
        if isinstance(key, slice):
            return aten.slice.Tensor(
                tensor, 0, key.start, key.stop if key.stop is not None else len(tensor)
            )
        return aten.index.Tensor(tensor, [at(key)])

    def at(key):
        return torch.tensor(key, device="cuda") if isinstance(key, list) else key

    def set_item(tensor, key, value):
        if isinstance(key, (int, slice)):
            item(tensor, key).copy_(value)
        else:
            aten.index_put_.default(tensor, [at(key)], value)

    routed("__getitem__", item)
    routed("__setitem__", set_item)
    routed("__invert__", aten.bitwise_not.default)
    routed("__neg__", aten.neg.default)
    routed("copy_", aten.copy_.default)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("DISTCLIP_KERNELS", "torch")  # there are no addresses
    monkeypatch.setattr(host.Readback, "enqueue", left)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def left(mirror, vector, what):
    """In place of pinned memory and events, which need a device. What went wrong while measuring
    would hide what comes after it."""
    measurement, _ = what
    assert measurement.errors == []


def parameters(device, shapes):
    out = []
    for i, shape in enumerate(shapes):
        p = nn.Parameter(torch.zeros(shape, device=device))
        p.grad = torch.ones_like(p)
        out.append((f"p{i}", p))
    return out


def clipped(shapes=((4, 5), (3,)), **options):
    """A clipper of parameters on the CPU, whose set-up reads values, moved to fake ones; an
    optimizer that steps nothing."""
    with unset_fake_temporarily():
        clipper = distclip.GradClipper(parameters("cpu", shapes), **options)
    members = [p for _, p in parameters("cuda", shapes)]
    clipper._state.groups = ()
    inputs = clipper._stages.inputs
    clipper._adopt(
        replace(
            inputs, members=members, scan=ParamScan(), device=torch.device("cuda", 0), config=""
        )
    )
    return clipper, members, optimizer_of(members)


def optimizer_of(params):
    optimizer = torch.optim.AdamW(params, fused=True)
    optimizer.step = lambda: None
    return optimizer


def watched(step, calls=2):
    for _ in range(calls):
        with Watched() as seen:
            step()
    return seen.found


POLICIES = [
    distclip.FixedNorm(1.0), distclip.Normalize(1.0), distclip.Scheduled([(0, 1.0), (5, 2.0)]), distclip.AutoClip(), distclip.ZClip(),
    distclip.AdaGC(), distclip.Warmup(distclip.ZClip(), 3, 1.0), distclip.SkipSpikes(distclip.FixedNorm(1.0)),
    distclip.Escalate(distclip.AutoClip()),
]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_a_folded_step_copies_and_reads_nothing(fake, policy):
    clipper, _, optimizer = clipped(policy=policy)
    assert watched(lambda: clipper.step(optimizer)) == set()


@pytest.mark.parametrize(
    "options",
    [{"norm_type": math.inf}, {"norm_type": 3.0}, {"groups": distclip.per_parameter()}],
    ids=str,
)
@pytest.mark.parametrize("fold", ["auto", "never"])
def test_propagating_copies_and_reads_nothing(fake, options, fold):
    clipper, _, optimizer = clipped(max_norm=1.0, on_nonfinite="propagate", fold=fold, **options)
    assert watched(lambda: clipper.step(optimizer)) == set()
    assert watched(clipper.clip_) == set()
    assert watched(clipper.measure) == set()


def test_clamping_copies_and_reads_nothing(fake):
    clipper, _, optimizer = clipped(policy=distclip.FixedValue(1.0), on_nonfinite="propagate")
    assert watched(lambda: clipper.step(optimizer)) == set()


def test_empty_shards_and_missing_gradients(fake):
    clipper, params, optimizer = clipped(shapes=((0, 5), (4, 5), (3,)), max_norm=1.0)
    assert watched(lambda: clipper.step(optimizer)) == set()
    params[2].grad = None
    assert watched(lambda: clipper.step(optimizer)) == set(), (
        "the second call with the same ones missing"
    )


@pytest.mark.parametrize("unscaled_before", [False, True])
def test_a_scaler(fake, unscaled_before):
    clipper, params, one = clipped(max_norm=1.0)
    one.param_groups[0]["params"] = params[:1]
    both = (one, optimizer_of(params[1:]))
    scaler = torch.amp.GradScaler("cpu")
    scaler._scale = torch.full((), 2.0, device="cuda")

    def step():
        scaler._per_optimizer_states.clear()
        if unscaled_before:
            found = {torch.device("cuda", 0): torch.zeros((), device="cuda")}
            scaler._per_optimizer_states[id(one)].update(
                stage=OptState.UNSCALED, found_inf_per_device=found
            )
        clipper.step(*both, scaler=scaler, update_scaler=False, grad_scale=0.5)

    assert watched(step) == set()


def test_the_drop_in(fake):
    _, params, _ = clipped(max_norm=1.0)
    assert watched(lambda: functional.clip_grad_norm_(params, 1.0)) == set()


def test_the_drop_in_for_values(fake):
    _, params, _ = clipped(max_norm=1.0)
    assert watched(lambda: functional.clip_grad_value_(params, 1.0)) == set()


def test_a_step_in_place_reads_once(fake):
    """The check sees what is there: one vector, read before anything is touched."""
    clipper, _, optimizer = clipped(max_norm=1.0, fold="never")
    with Watched() as seen, pytest.raises(Exception, match="_local_scalar_dense"):
        clipper.step(optimizer)
    assert "readback.py: read" in seen.found


@pytest.mark.parametrize(
    "act, what",
    [
        (lambda x: torch.tensor([1.0], device="cuda"), "cpu to cuda"),
        (lambda x: x.to("cpu"), "cuda to cpu"),
        (lambda x: aten.copy_.default(x, torch.ones(3)), "cpu to cuda"),
        (lambda x: aten.index.Tensor(x, [aten.gt.Scalar(x, 0)]), "read"),
        (lambda x: x.sum().item(), "read"),
    ],
)
def test_the_check_catches(fake, act, what):
    x = torch.ones(3, device="cuda")
    with Watched() as seen, suppress(RuntimeError):  # of what has no value
        act(x)
    assert seen.found == {what}


# What the host decides by itself


class Launched(TorchDispatchMode):
    """Names of the operations on the device, but for views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        seen = (out, *args, *(args[0] if args and isinstance(args[0], (list, tuple)) else ()))
        devices = {t.device.type for t in seen if isinstance(t, torch.Tensor)}
        is_work = not func.is_view and func is not torch.ops.prim.device.default
        if is_work and "cuda" in devices:
            self.names.append(str(func))
        return out


def told(monkeypatch, norm):
    """A message of one rank in place of the one that is read: nothing has a value here."""
    reads = []

    def read_now(vector):
        reads.append(vector)
        assert vector.numel() == 5  # what does not depend on gradients is not read
        return [norm**2, 0.0, 0.0, 2.0, 0.0]

    monkeypatch.setattr(host.Readback, "read_now", staticmethod(read_now))
    return reads


@pytest.mark.parametrize("norm", [0.5, 5.0])
@pytest.mark.parametrize("call", ["clip_", "clip_ with an optimizer", "step", "measure"])
def test_what_the_host_decides_by_itself_is_read_once(fake, monkeypatch, norm, call):
    clipper, _, optimizer = clipped(max_norm=1.0, fold="never")
    reads = told(monkeypatch, norm)
    calls = {
        "clip_": clipper.clip_,
        "clip_ with an optimizer": lambda: clipper.clip_(optimizer),
        "step": lambda: clipper.step(optimizer),
        "measure": clipper.measure,
    }
    with Launched() as launched:
        assert watched(calls[call]) == set()
    assert len(reads) == 2 and {vector.device.type for vector in reads} == {"cuda"}
    scaled = [name for name in launched.names if "foreach_mul" in name]
    assert bool(scaled) == (norm > 1 and call != "measure")
    if call == "measure":
        report = clipper.measure()
    else:
        report = clipper.last_report
        assert report.__dict__["skipped"] is False
        assert clipper._state.history.clip_rate == (norm > 1)
    assert report.__dict__["total_norm"] == norm
    assert {report.total_norm.device.type, report.coefs.device.type} == {"cuda"}
    assert report.on_host().norm_after.device.type == "cpu"
    with Watched() as seen:
        numbers = [report.clipped, report.nonfinite, report.threshold, report.cosine]
    assert seen.found == set(), "what is read later waits for nothing either"
    assert {number.dtype for number in numbers} == {torch.bool, torch.int64, torch.float32}


def test_few_operations_stand_around_the_sums(fake, monkeypatch):
    """Of a clip that changes nothing, beside the read. Where torch computes the sums, they are
    operations too."""
    clipper, _, _ = clipped(max_norm=1.0)
    told(monkeypatch, 0.5)
    clipper.clip_()
    with Launched() as sums:
        clipper._stages.measurer.collector.collect()[1].power_sums(2.0)
    with Launched() as whole:
        clipper.clip_()
    assert sums.names, "vacuous"
    assert len(whole.names) - len(sums.names) <= 5, whole.names


def test_the_operations_of_a_folded_step(fake):
    """Numbers that the host knows are not sent to be read again."""
    clipper, _, optimizer = clipped(max_norm=1.0)
    clipper.step(optimizer)
    with Launched() as sums:
        clipper._stages.measurer.collector.collect()[1].power_sums(2.0)
    with Launched() as whole:
        clipper.step(optimizer)
    assert sums.names, "vacuous"
    assert len(whole.names) - len(sums.names) <= 61, whole.names


# Where kernels compute a step's numbers


@pytest.fixture
def kernels(fake, monkeypatch):
    """Names of what is launched: of torch's operations, but for memory that is only allocated, and
    of the kernels, which find no memory here and are told alone. Power sums, and what is done to
    gradients, stay torch's here; they are one or two launches where kernels do them."""
    names = []

    class Counted(Launched):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = super().__torch_dispatch__(func, types, args, kwargs)
            names.extend(name for name in self.names if "empty" not in name)
            self.names.clear()
            return out

    def power_sums(listed, p, out=None):
        names.extend(("chunk_sums", "tensor_sums"))
        return torch.empty(len(listed.tensors), dtype=torch.float64, device="cuda")

    def run(launcher, program, *args):
        names.append(program.__name__)

    monkeypatch.setattr(TensorList, "power_sums", power_sums)
    monkeypatch.setattr(TensorList, "scale_", lambda listed, by: names.append("change_chunks"))
    monkeypatch.setattr(triton_launch.KernelLauncher, "run", run)
    for file in (message, fixed_on_device, state):
        monkeypatch.setattr(file, "kernels_for", lambda dtypes, device: "triton")
    with Counted():
        yield names


OF_A_STEP = ["chunk_sums", "tensor_sums", "pack_words", "decide_fixed", "record_step"]


def launched(names, step):
    """By one call after three others."""
    for _ in range(3):
        step()
    names.clear()
    step()
    assert [name for name in names if name in OF_A_STEP] == OF_A_STEP
    return [name for name in names if name not in OF_A_STEP]


@needs_triton
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_launches_of_a_folded_step(kernels, norm_type):
    """Beside the copy of what the host reads later: `left` takes its place here."""
    clipper, _, optimizer = clipped(max_norm=1.0, norm_type=norm_type)
    assert launched(kernels, lambda: clipper.step(optimizer)) == ["aten.clone.default"]


@needs_triton
@pytest.mark.parametrize("groups", ["all", "per_parameter"])
def test_launches_of_a_clip_that_propagates(kernels, groups):
    options = {} if groups == "all" else {"groups": distclip.per_parameter()}
    clipper, _, _ = clipped(max_norm=1.0, on_nonfinite="propagate", **options)
    others = launched(kernels, clipper.clip_)
    index = [] if groups == "all" else ["aten.index.Tensor"]
    assert others == ["aten.clone.default", *index, "change_chunks"]


@needs_triton
@pytest.mark.parametrize("norm", [0.5, 5.0])
def test_launches_of_a_clip_that_the_host_decides(kernels, monkeypatch, norm):
    message = [norm**2, 0.0, 0.0, 2.0] + [0.0] * 9
    monkeypatch.setattr(host.Readback, "read_now", staticmethod(lambda vector: message))
    clipper, _, _ = clipped(max_norm=1.0)
    for _ in range(3):
        clipper.clip_()
    kernels.clear()
    clipper.clip_()
    scaled = ["change_chunks"] if norm > 1 else []
    assert kernels == ["chunk_sums", "tensor_sums", "pack_words", *scaled]


@needs_triton
def test_launches_of_a_step_with_a_scaler(kernels):
    clipper, _, optimizer = clipped(max_norm=1.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler._scale = torch.full((), 2.0, device="cuda")

    def step():
        scaler._per_optimizer_states.clear()
        clipper.step(optimizer, scaler=scaler, update_scaler=False)

    assert len(launched(kernels, step)) + len(OF_A_STEP) <= 11


@needs_triton
@pytest.mark.parametrize(
    "policy", [distclip.ZClip(), distclip.AutoClip()], ids=["zclip", "autoclip"]
)
def test_other_policies_have_the_message_and_the_counters(kernels, policy):
    clipper, _, optimizer = clipped(policy=policy)
    for _ in range(3):
        clipper.step(optimizer)
    kernels.clear()
    clipper.step(optimizer)
    found = [name for name in kernels if name in OF_A_STEP]
    assert found == [name for name in OF_A_STEP if name != "decide_fixed"]


def test_memory_of_the_host_is_not_given_to_what_is_elsewhere(monkeypatch):
    """The model was moved after set-up, or `grad_of` finds gradients there."""
    monkeypatch.setenv("DISTCLIP_KERNELS", "torch")
    here = parameters("cpu", ((4,), (3,)))
    with FakeTensorMode():
        moved = {id(p): torch.ones(p.shape, device="cuda") for _, p in here}
    clipper = distclip.GradClipper(here, 1.0, grad_of=lambda param: moved[id(param)])
    given = []

    def power_sums(listed, p, out=None):
        given.append(([tensor.device.type for tensor in listed.tensors], out))
        return torch.tensor([9.0, 16.0], dtype=torch.float64)

    monkeypatch.setattr(TensorList, "power_sums", power_sums)
    assert clipper.measure().total_norm == 5
    assert given == [(["cuda", "cuda"], None)]


def test_counters_go_to_the_device_at_the_first_step_that_is_judged_late(fake, monkeypatch):
    clipper, _, optimizer = clipped(max_norm=1.0)
    told(monkeypatch, 5.0)
    clipper.clip_()
    assert clipper._state.on_host and clipper._state.history.num_calls == 1
    clipper.step(optimizer)
    history = clipper._state.history
    assert not clipper._state.on_host and history.num_calls.device.type == "cuda"
    assert history.clip_rate.device.type == clipper._state.last_hash.device.type == "cuda"
    assert watched(lambda: clipper.step(optimizer)) == set()


def test_a_report_that_nobody_reads_is_not_worked_out(fake):
    clipper, _, optimizer = clipped(max_norm=1.0)
    for _ in range(2):
        clipper.step(optimizer)
    with Launched() as unread:
        clipper.step(optimizer)
    with Launched() as read:
        report = clipper.step(optimizer)
        assert report.norm_after.device.type == "cuda"
    assert len(read.names) - len(unread.names) >= 20
    assert watched(lambda: clipper.step(optimizer).coefs) == set()
