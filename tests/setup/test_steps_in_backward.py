"""Optimizers that step inside `backward()`: a clip that cannot reach their gradients is refused, or
said where it reaches others."""

import logging
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from distclip.testing import count_collectives
from precision.jobs import mlp
from setup.test_refusals import refusal
from torchs_own import ZeroRedundancyOptimizer, _apply_optimizer_in_backward


def step_inside(params):
    _apply_optimizer_in_backward(torch.optim.SGD, params, {"lr": 0.1})


def batch():
    source = torch.Generator().manual_seed(7)
    return torch.randn(5, 6, generator=source) * 3, torch.randn(5, 4, generator=source)


def backward(model):
    x, y = batch()
    (model(x.to(model[0].weight.dtype)) - y).square().mean().backward()


def every_parameter():
    model = mlp()
    step_inside(model.parameters())
    return refusal(lambda: distclip.GradClipper(model, 0.1))


def later():
    """The clipper was there before."""
    model = mlp()
    clipper = distclip.GradClipper(model, 0.1)
    step_inside(model.parameters())
    backward(model)
    return refusal(clipper.clip_)


def communication_hook():
    model = nn.Sequential(DDP(mlp()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its functional SGD, torch.jit.script
        model[0]._register_fused_optim(torch.optim.SGD, lr=0.1)
    return refusal(lambda: distclip.GradClipper(model, 0.1))


def overlapped(operation):
    model = DDP(mlp())
    clipper = distclip.GradClipper(model, 0.1)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=0.1
    )
    model(batch()[0]).square().mean().backward()
    return refusal(lambda: getattr(clipper, operation)(optimizer))


@pytest.mark.parametrize(
    "job, args, wanted",
    [
        (
            every_parameter,
            (),
            "ConfigError: 4 of 4 trainable parameters are stepped inside backward() (0.weight, by "
            "SGD), which leaves no gradient of theirs: there is nothing to clip; give them to an "
            "optimizer that is stepped after backward() and the clip",
        ),
        (
            later,
            (),
            "GradientError: step 1: rank 0-3: no parameter has a gradient, and the hook SGD of "
            "0.weight (4 parameters have such hooks) runs as soon as a gradient is accumulated: an "
            "optimizer that steps inside backward leaves nothing to clip, and the global norm is "
            "not known yet there; step after the clip, without this hook",
        ),
        (
            communication_hook,
            (),
            "ConfigError: the communication hook _hook_then_optimizer.<locals>."
            "hook_then_optimizer_wrapper of 0 steps an optimizer inside backward(), before the "
            "global norm is known: its steps would not be clipped. Register a hook that only "
            "reduces, and step after the clip",
        ),
        *(
            (
                overlapped,
                (operation,),
                f"ConfigError: {operation}() was given a ZeroRedundancyOptimizer with "
                "overlap_with_ddp=True: it steps inside backward(), before the global norm is "
                "known, and would not be clipped; build it without overlap_with_ddp",
            )
            for operation in ("step", "clip_")
        ),
    ],
)
def test_what_no_clip_can_reach_is_refused(ranks, job, args, wanted):
    assert ranks.run(job, *args) == [wanted] * 4


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def some():
    """Of a model of which each rank holds the same."""
    model, heard, log = mlp(), Heard(), logging.getLogger("distclip")
    step_inside(model[0].parameters())
    log.addHandler(heard)
    try:
        clipper = distclip.GradClipper(model, 0.1)
    finally:
        log.removeHandler(heard)
    backward(model)
    with count_collectives() as seen:
        report = clipper.clip_()
    after = [p.grad.norm().item() for p in model[2].parameters()]
    return heard.lines, report.total_norm.item(), report.clipped, after, seen.names


def test_some_are_said_and_the_others_clipped(ranks):
    clean = mlp().double()
    backward(clean)
    grads = [p.grad for p in clean[2].parameters()]
    exact = math.hypot(*(grad.norm().item() for grad in grads))
    assert exact > 0.1
    for lines, norm, clipped, after, seen in ranks.run(some):
        assert lines == [
            "GradClipper: 2 of 4 trainable parameters are stepped inside backward() (0.weight, by "
            "SGD), which leaves no gradient of theirs: they are neither in the norm nor clipped. "
            "If that is not meant, give them to an optimizer that is stepped after backward() and "
            "the clip; if it is, pass the other parameters alone"
        ]
        assert norm == pytest.approx(exact, rel=1e-6) and clipped
        wanted = [grad.norm().item() * 0.1 / exact for grad in grads]
        assert after == pytest.approx(wanted, rel=1e-5)
        assert seen == ["allreduce_"]
