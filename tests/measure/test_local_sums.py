"""What goes wrong while this rank measures travels in the message and is raised afterwards."""

import math
import traceback

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import distclip
from kernels.native_cases import NO_LIBRARY
from parity.layouts import given


class Buggy(distclip.FixedNorm):
    """Fails while it looks at the gradients, on the last rank alone."""

    num_stats = 1

    def local_stats(self, own):
        if not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1:
            self.look_into_it()
        return torch.zeros(own.groups, 1, dtype=torch.float64)

    def look_into_it(self):
        raise KeyError("window")


def test_an_exception_keeps_its_traceback():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 5.0)
    clipper = distclip.GradClipper([("p", p)], policy=Buggy(1.0))
    with pytest.raises(distclip.GradientError, match="step 1: rank 0: KeyError: 'window'") as error:
        clipper.clip_()
    cause = error.value.__cause__
    assert isinstance(cause, KeyError)
    assert traceback.extract_tb(cause.__traceback__)[-1].name == "look_into_it"
    assert p.grad.tolist() == [5.0] * 3


def refused():
    name, p = given("w", 40)
    before = p.grad.clone()
    clipper = distclip.GradClipper([(name, p)], policy=Buggy(0.1))
    with pytest.raises(distclip.GradientError) as error:
        clipper.clip_()
    cause = error.value.__cause__
    return str(error.value), type(cause).__name__, torch.equal(p.grad, before)


def test_it_is_raised_on_all_ranks_from_what_one_of_them_met(ranks):
    rows = ranks.run(refused)
    assert {text for text, *_ in rows} == {"step 1: rank 3: KeyError: 'window'"}
    assert [cause for _, cause, _ in rows] == ["NoneType"] * 3 + ["KeyError"]
    assert all(untouched for *_, untouched in rows)


class Measuring(distclip.FixedNorm):
    """Measures other gradients by the same clipper, while a step is measured and while it is
    decided."""

    num_stats = 1
    clippers = []  # noqa: RUF012

    def _measure(self):
        if self.clippers:
            clipper, p = self.clippers.pop()
            own, p.grad = p.grad, torch.full_like(p, 100.0)
            assert clipper.measure().total_norm == 200
            p.grad = own
            self.clippers.append((clipper, p))

    def local_stats(self, own):
        self._measure()
        return torch.zeros(own.groups, 1, dtype=torch.float64)

    def decide(self, norms, state):
        self._measure()
        return super().decide(norms, state)


def test_memory_of_an_earlier_call_is_not_written_while_it_is_in_use():
    p = nn.Parameter(torch.ones(4))
    clipper = distclip.GradClipper([("p", p)], policy=Measuring(1.0), sinks=[lambda report: None])
    Measuring.clippers = [(clipper, p)]
    try:
        for _ in range(3):
            p.grad = torch.full((4,), 5.0)
            assert clipper.clip_().total_norm == 10
            assert p.grad.tolist() == [0.5] * 4
        p.grad = torch.tensor([1.0, math.nan, 1.0, 1.0])
        (culprit,) = clipper.clip_().culprits
        assert (culprit.parameter, culprit.kind) == ("p", "NaN")
    finally:
        Measuring.clippers = []


def test_memory_is_taken_again_once_a_call_is_over():
    p = nn.Parameter(torch.ones(4))
    clipper = distclip.GradClipper([("p", p)], 1.0)
    measurer = clipper._stages.measurer
    places = set()
    for inference in (True, False, True, False):
        p.grad = torch.full((4,), 5.0)
        with torch.inference_mode(inference):
            clipper.clip_()
        (memory,) = measurer.spare_memory
        places.add(memory.data_ptr())
        assert not memory.is_inference()
    assert len(places) == 1
    assert measurer._memory_for(2).shape == (2,) and not measurer.spare_memory


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(NO_LIBRARY, reason="no library")
@pytest.mark.parametrize("absent", [(), (1,), (0, 3)], ids=str)
def test_a_small_step_on_the_cpu_makes_no_operation_of_torch(absent):
    """As it often is under FSDP1, a rank may have no part of some parameters."""
    draw = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(5, 3, generator=draw)) for _ in range(5)]
    clipper = distclip.GradClipper(params, 0.5)
    for _ in range(4):
        grads = [None if i in absent else torch.randn(5, 3, generator=draw) for i in range(5)]
        for p, grad in zip(params, grads, strict=True):
            p.grad = None if grad is None else grad.clone()
        with Operations() as seen:
            report = clipper.clip_()
    assert seen.names == []
    there = [grad for grad in grads if grad is not None]
    total = torch.cat([grad.double().flatten() for grad in there]).norm()
    assert float(report.total_norm) == pytest.approx(float(total), rel=1e-6) and total > 1
    for p, grad in zip(params, grads, strict=True):
        assert grad is None or torch.allclose(p.grad.double(), grad.double() * (0.5 / total))
