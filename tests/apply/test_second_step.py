"""`optimizer.step()` left in behind `clipper.step(optimizer)` is told, once; what is meant is not."""

import gc
import math
import warnings
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip.testing import fully_shard
from late import judged_late
from parity.layouts import mesh

TEXT = (
    "{}.step() comes behind clipper.step(optimizer), with the same gradients: clipper.step() has "
    "{}. Remove optimizer.step(), or scaler.step() and scaler.update(), from your loop, or keep it "
    "and call clipper.clip_() before it in place of clipper.step()"
)
BEFORE = TEXT.replace("behind", "before").replace(
    "clipper.step() has {}", "parameters move twice, the first time unclipped"
)
TAKEN = "taken this step, so that parameters move twice"


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def backward(model, step=0, scaler=None):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
    loss = model(x).square().mean()
    (loss if scaler is None else scaler.scale(16 * loss)).backward()


def said(loop, *args):
    """The warnings of a loop."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        loop(*args)
    ours = [warning for warning in found if "clipper.step" in str(warning.message)]
    assert all(warning.filename == __file__ for warning in ours), "at the user's own line"
    return [f"{warning.category.__name__}: {warning.message}" for warning in ours]


def hooks(optimizer):
    return len(optimizer._optimizer_step_pre_hooks)


def migrated(make, late, scheduled, fold):
    """A loop in which optimizer.step() was left."""
    model = net()
    optimizer = make(model.parameters())
    clipper = judged_late(distclip.GradClipper(model, 0.1, fold=fold), late)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer) if scheduled else None
    for step in range(15):
        backward(model, step)
        clipper.step(optimizer)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()
    assert not hooks(optimizer)


@pytest.mark.parametrize("late", [False, True, "device"])
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize(
    "make, fold",
    [
        (partial(torch.optim.SGD, lr=0.1), "auto"),
        (partial(torch.optim.AdamW, fused=True), "auto"),
        (partial(torch.optim.AdamW, fused=True), "never"),
        (torch.optim.NAdam, "auto"),
    ],
)
def test_an_optimizer_step_that_was_left_in_is_told_once(make, fold, late, scheduled):
    kind = type(make([nn.Parameter(torch.ones(1))])).__name__
    wanted = [f"RuntimeWarning: {TEXT.format(kind, TAKEN)}"]
    assert said(migrated, make, late, scheduled, fold) == wanted


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("late", [False, True, "device"])
@pytest.mark.parametrize("plain", [False, True])
def test_a_scaler_step_that_was_left_in_is_told(plain, late, fused):
    """The first steps overflow: the scaler steps nothing then."""

    def loop():
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        clipper = judged_late(distclip.GradClipper(model, 0.1), late)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
        for step in range(10):
            backward(model, step, scaler)
            clipper.step(optimizer, scaler=scaler)
            if plain:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() < 2.0**127, "vacuous: no step overflowed"

    # a scaler steps a fused optimizer at an overflow too; where that folds late, nobody knew of it
    at_once = not late if fused else plain
    did = "left this step out" if at_once else TAKEN
    assert said(loop) == [f"RuntimeWarning: {TEXT.format('AdamW', did)}"]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("fused", [None, True])
def test_a_step_that_was_left_in_before_the_clippers_is_told(fused, scaled):
    """At the second: before the first there is no hook yet."""

    def loop():
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        clipper = distclip.GradClipper(model, 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
        for step in range(4):
            backward(model, step, scaler)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            clipper.step(optimizer, scaler=scaler)
            optimizer.zero_grad()
            assert hooks(optimizer) == (step == 0)

    assert said(loop) == [f"RuntimeWarning: {BEFORE.format('AdamW')}"]


def test_a_step_that_was_left_out_and_is_taken_is_told():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    clipper = distclip.GradClipper(model, 0.1)

    def loop():
        for p in model.parameters():
            p.grad = torch.full_like(p, math.nan)
        clipper.step(optimizer)
        optimizer.step()

    assert said(loop) == [f"RuntimeWarning: {TEXT.format('SGD', 'left this step out')}"]


def wrapped(how):
    model = net()
    if how == "fsdp2":
        return fully_shard(model, mesh=mesh(4))
    if how == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    return DistributedDataParallel(model, gradient_as_bucket_view=how == "bucket views")


def alternating(model, optimizer, clipper, set_to_none, closure):
    """Each way to step, turn and turn about: each step has gradients of its own."""
    for step in range(12):
        if closure and step % 3 == 1:

            def again(step=step):
                optimizer.zero_grad(set_to_none)
                backward(model, step)
                clipper.clip_()

            optimizer.step(again)
            continue
        optimizer.zero_grad(set_to_none)
        backward(model, step)
        if step % 3 == 0:
            clipper.step(optimizer)
        elif step % 3 == 1:
            clipper.clip_()
            optimizer.step()
        else:
            optimizer.step()


def on_ranks(how, left_in):
    model = wrapped(how)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    clipper = distclip.GradClipper(model, 0.1)

    def mistaken():
        for step in range(3):
            optimizer.zero_grad()
            backward(model, step)
            clipper.step(optimizer)
            optimizer.step()

    if left_in:
        return said(mistaken)
    return [
        *said(alternating, model, optimizer, clipper, True, False),
        *said(alternating, model, optimizer, clipper, False, True),
    ]


@pytest.mark.parametrize("how", ["ddp", "bucket views", "fsdp1", "fsdp2"])
def test_under_wrappers_too_and_turns_are_not_told(ranks, how):
    assert (
        ranks.run(on_ranks, how, True) == [[f"RuntimeWarning: {TEXT.format('AdamW', TAKEN)}"]] * 4
    )
    assert ranks.run(on_ranks, how, False) == [[]] * 4


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("closure", [True, False])
def test_loops_of_both_kinds_are_not_told(set_to_none, closure):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    clipper = distclip.GradClipper(model, 0.1)
    assert said(alternating, model, optimizer, clipper, set_to_none, closure) == []


def test_an_optimizer_of_other_parameters_is_not_told():
    """As two networks that are trained against one another, one of them clipped."""

    def loop():
        models = net(), net()
        first, second = (torch.optim.SGD(model.parameters(), 0.1) for model in models)
        clipper = distclip.GradClipper(models[0], 0.1)
        for step in range(4):
            for model in models:
                model.zero_grad()
                backward(model, step)
            clipper.step(first)
            second.step()

    assert said(loop) == []


def test_two_clippers_that_step_one_optimizer_are_told():
    def loop():
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        clippers = [distclip.GradClipper(part, 0.1) for part in (model[0], model[2])]
        backward(model)
        for clipper in clippers:
            clipper.step(optimizer)

    assert said(loop) == [f"RuntimeWarning: {TEXT.format('SGD', TAKEN)}"]


def test_where_warnings_are_errors_it_is_logged(caplog):
    migrated(partial(torch.optim.SGD, lr=0.1), False, False, "auto")
    assert [r.getMessage() for r in caplog.records] == [TEXT.format("SGD", TAKEN)]


def test_hooks_are_there_for_the_first_steps_alone_and_hold_nothing():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    clipper = distclip.GradClipper(model, 0.1)
    there = []
    for step in range(14):
        backward(model, step)
        clipper.step(optimizer)
        there.append(hooks(optimizer))
        grad = weakref.ref(model[0].weight.grad)
        model.zero_grad()
        assert grad() is None
    assert there == [1] * 10 + [0] * 4

    clipper = distclip.GradClipper(model, 0.1)
    backward(model)
    clipper.step(optimizer)
    assert hooks(optimizer) == 1
    gone = weakref.ref(clipper)
    del clipper
    gc.collect()
    assert gone() is None and hooks(optimizer) == 0


def test_gradients_that_lie_elsewhere_are_not_watched():
    p = nn.Parameter(torch.zeros(2))
    p.main_grad = p.grad = torch.ones(2)
    optimizer = torch.optim.SGD([p], 0.1)
    distclip.GradClipper([("w", p)], 1.0, grad_of=lambda q: q.main_grad).step(optimizer)
    assert not hooks(optimizer)
