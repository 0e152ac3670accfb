"""Optimizers that step inside `backward()`: a clip that cannot reach their gradients is refused, or
said where it reaches others."""

import logging
import math
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.ddp_comm_hooks.optimizer_overlap_hooks import _hook_then_optimizer
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


def communication_hook_of_rank_norms():
    """Under that of RankNorms it would not be seen."""
    hook = _hook_then_optimizer(allreduce_hook, object())
    return refusal(lambda: distclip.RankNorms(DDP(mlp()), comm_hook=(None, hook)))


def communication_hook_later():
    """The clipper was there before; DDP takes such a hook until its first backward()."""
    model = nn.Sequential(DDP(mlp()))
    clipper = distclip.GradClipper(model, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model[0]._register_fused_optim(torch.optim.SGD, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    model(batch()[0]).square().mean().backward()
    assert not all(map(torch.equal, before, model.parameters())), "vacuous"
    assert all(p.grad is not None for p in model.parameters()), "vacuous"
    return refusal(clipper.clip_)


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
        (
            communication_hook_later,
            (),
            "GradientError: step 1: rank 0-3: the communication hook _hook_then_optimizer.<locals>."
            "hook_then_optimizer_wrapper of 0 steps an optimizer inside backward(), before the "
            "global norm is known: its steps would not be clipped. Register a hook that only "
            "reduces, and step after the clip",
        ),
        (
            communication_hook_of_rank_norms,
            (),
            "ConfigError: the communication hook _hook_then_optimizer.<locals>."
            "hook_then_optimizer_wrapper of RankNorms steps an optimizer inside backward(), before "
            "the global norm is known: its steps would not be clipped. Register a hook that only "
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


def stages(num_early):
    """Of each rank another stage; those of the first ranks are stepped in backward."""
    rank = dist.get_rank()
    stage = nn.ModuleDict({f"stage{rank}": nn.Linear(3, 2, bias=False)})
    if rank < num_early:
        step_inside(stage.parameters())
    clipper = None
    try:
        clipper = distclip.GradClipper(stage, 0.1)
    except distclip.ConfigError as error:
        return str(error)
    stage[f"stage{rank}"](torch.ones(3)).sum().backward()
    return clipper.clip_().total_norm.item()


def test_a_stage_that_no_clip_can_reach_does_not_end_the_others(ranks):
    assert ranks.run(stages, 1) == pytest.approx([math.sqrt(3 * 6)] * 4)
    for rank, text in enumerate(ranks.run(stages, 4)):
        assert text.startswith(
            f"1 of 1 trainable parameters are stepped inside backward() (stage{rank}.weight, by SGD"
            "), which leaves no gradient of theirs: there is nothing to clip; give"
        )


def after_a_forward_pass():
    """DDP has registered a hook of its own then, which steps those parameters alone."""
    model = mlp()
    step_inside(model[0].parameters())
    model = DDP(model)
    clipper = distclip.GradClipper(model, 0.1)
    model(batch()[0])
    assert model._comm_hooks, "vacuous"
    clipper.rebuild()
    for p in model.module[2].parameters():
        p.grad = torch.ones_like(p)
    return clipper.clip_().total_norm.item(), sum(p.numel() for p in model.module[2].parameters())


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="DDP asks for a stream, which a torch for CUDA makes with a driver alone",
)
def test_the_hook_that_ddp_registers_for_some_parameters_is_no_refusal(ranks):
    for norm, num in ranks.run(after_a_forward_pass):
        assert norm == pytest.approx(math.sqrt(num), rel=1e-6)


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@contextmanager
def heard():
    """What distclip logs meanwhile."""
    handler, log = Heard(), logging.getLogger("distclip")
    log.addHandler(handler)
    try:
        yield handler.lines
    finally:
        log.removeHandler(handler)


def some():
    """Of a model of which each rank holds the same."""
    model = mlp()
    step_inside(model[0].parameters())
    with heard() as lines:
        clipper = distclip.GradClipper(model, 0.1)
    backward(model)
    with count_collectives() as seen:
        report = clipper.clip_()
    after = [p.grad.norm().item() for p in model[2].parameters()]
    return lines, report.total_norm.item(), report.clipped, after, seen.names


def some_later(how):
    """Between the second and the third of six steps; lines of each, norms, messages."""
    model, lines, norms, names = mlp(), [], [], []
    clipper = distclip.GradClipper(model, 0.1)
    for step in range(6):
        if step == 2:
            how(list(model[0].parameters()))
        model.zero_grad()
        backward(model)
        with heard() as new, count_collectives() as seen:
            norms.append(clipper.clip_().total_norm.item())
        lines.append(new)
        names.append(seen.names)
    return lines, norms, names


def step_in_hooks(params):
    """As torch's tutorial does."""
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in params}

    def optimizer_hook(param):
        optimizers[param].step()
        optimizers[param].zero_grad()

    for p in params:
        p.register_post_accumulate_grad_hook(optimizer_hook)


@pytest.mark.parametrize(
    "how, text",
    [
        (
            step_inside,
            "GradClipper: 2 of 4 trainable parameters are stepped inside backward() since the "
            "clipper was built (0.weight, by SGD): they are neither in the norm nor clipped. ",
        ),
        (
            step_in_hooks,
            "GradClipper: 2 of 4 trainable parameters have no gradient and a hook that runs as "
            "soon as one is accumulated (0.weight, by step_in_hooks.<locals>.optimizer_hook): if "
            "it steps an optimizer, they are neither in the norm nor clipped. ",
        ),
    ],
)
def test_some_that_come_later_are_said_once(ranks, how, text):
    advice = (
        "If that is not meant, give them to an optimizer that is stepped after backward() and the "
        "clip; if it is, pass the other parameters alone"
    )
    for lines, norms, names in ranks.run(some_later, how):
        assert lines == [[], [], [text + advice], [], [], []]
        assert norms[2] < norms[1] * 0.99, "vacuous: some of the norm is gone"
        assert names == [["allreduce_"]] * 6


def unused(kind):
    """Parameters without a gradient, as they are every day: nothing is said."""
    model = mlp()
    clipper = distclip.GradClipper(model, 0.1)
    if kind == "hooked":  # and with one at each step
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda _: None)
    with heard() as lines:
        for step in range(4):
            model.zero_grad()
            backward(model)
            if kind == "some" and step % 2:
                model[0].weight.grad = None
            clipper.clip_()
    return lines


@pytest.mark.parametrize("kind", ["some", "hooked"])
def test_gradients_that_are_not_there_are_no_steps_in_backward(ranks, kind):
    assert ranks.run(unused, kind) == [[]] * 4


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
