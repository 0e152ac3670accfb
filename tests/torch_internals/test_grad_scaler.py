"""The handshake with GradScaler, in one process: unscaled exactly once, recorded per optimizer,
refused where it cannot be honoured."""

import math

import pytest
import torch
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import distclip
import skips
from parity.oracle import total_norm

SCALE = 1024.0


def scaler_of(**options):
    scaler = torch.amp.GradScaler("cpu", **{"init_scale": SCALE, "growth_interval": 100} | options)
    scaler.scale(torch.ones(()))
    return scaler


def scaled(*values, dtype=torch.float32, scale=SCALE):
    """Named parameters whose gradients are `values`, times the scale."""
    out = []
    for i, value in enumerate(values):
        p = nn.Parameter(torch.zeros(len(value), dtype=dtype))
        p.grad = (torch.tensor(value) * scale).to(dtype)
        out.append((f"w{i}", p))
    return out


def sgd(*params, **options):
    return torch.optim.SGD([p for _, p in params], 1.0, **options)


def moved(params):
    return [value for _, p in params for value in (-p.detach().double()).tolist()]


@pytest.mark.parametrize("how", ["step", "step after unscale_", "clip_", "clip_ after unscale_"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_unscaled_exactly_once(how, fused, p):
    params, scaler = scaled([3.0, -4.0], [12.0]), scaler_of()
    optimizer, clipper = sgd(*params, fused=fused), distclip.GradClipper(params, 6.5, norm_type=p)
    if "unscale_" in how:
        scaler.unscale_(optimizer)
    if how.startswith("step"):
        report = clipper.step(optimizer, scaler=scaler)
    else:
        report = clipper.clip_(optimizer, scaler)
        assert [g for _, w in params for g in w.grad.tolist()] == pytest.approx(
            [x * report.clip_coef.item() for x in (3, -4, 12)], rel=1e-6
        )
        scaler.step(optimizer)
        scaler.update()
    want = total_norm([torch.tensor([3.0, -4.0, 12.0])], p)
    assert report.total_norm.item() == pytest.approx(want, rel=1e-7) and want > 6.5
    assert moved(params) == pytest.approx([x * 6.5 / want for x in (3, -4, 12)], rel=1e-6)
    assert scaler.get_scale() == SCALE


def test_two_optimizers_of_which_one_was_unscaled_before():
    params, scaler = scaled([3.0, -4.0], [12.0]), scaler_of()
    first, second = sgd(params[0]), sgd(params[1])
    scaler.unscale_(first)
    report = distclip.GradClipper(params, 6.5).step(first, second, scaler=scaler, grad_scale=0.5)
    assert report.total_norm.item() == 6.5 and report.clip_coef == 1
    assert moved(params) == pytest.approx([1.5, -2.0, 6.0], rel=1e-6)


@pytest.mark.parametrize("how", ["step", "clip_"])
@pytest.mark.parametrize("max_norm", [1e6, 1e3])
def test_a_grad_scale_that_undoes_the_loss_scale_is_for_what_is_clipped_alone(how, max_norm):
    """All factors are 1 in the first case, but of a parameter that the clipper does not know."""
    params, scaler = scaled([3.0, -4.0], [12.0]), scaler_of()
    optimizer, clipper = sgd(*params), distclip.GradClipper(params[:1], max_norm)
    with pytest.warns(RuntimeWarning, match="steps 1 parameter that this clipper does not know"):
        if how == "step":
            report = clipper.step(optimizer, scaler=scaler, grad_scale=SCALE)
        else:
            report = clipper.clip_(optimizer, scaler, grad_scale=SCALE)
            scaler.step(optimizer)
            scaler.update()
    norm = 5 * SCALE
    assert report.total_norm.item() == norm and report.clipped == (max_norm < norm)
    factor = SCALE * min(1, max_norm / norm)
    assert moved(params) == pytest.approx([3 * factor, -4 * factor, 12.0], rel=1e-6)


@pytest.mark.filterwarnings("ignore:value clipping turned the gradient")
def test_value_clipping_is_of_unscaled_gradients():
    params, scaler = scaled([3.0, -4.0], [12.0]), scaler_of()
    first, second = sgd(params[0]), sgd(params[1])
    scaler.unscale_(first)
    report = distclip.GradClipper(params, policy=distclip.FixedValue(3.5)).step(
        first, second, scaler=scaler
    )
    assert moved(params) == [3.0, -3.5, 3.5]
    assert (
        report.norm_after.item() == pytest.approx(math.sqrt(9 + 2 * 3.5**2), rel=1e-6)
        and report.clipped
    )


@skips.told()
def test_parameters_that_the_clipper_does_not_know_are_unscaled_and_watched():
    """A subset is clipped; the optimizer steps all of them."""
    params, scaler = scaled([3.0, 4.0], [100.0]), scaler_of()
    optimizer, clipper = sgd(*params), distclip.GradClipper(params[:1], 2.5)
    with pytest.warns(
        RuntimeWarning,
        match=r"steps 1 parameter that this clipper does not know "
        r".*neither clipped nor in the norm",
    ):
        clipper.step(optimizer, scaler=scaler)
    assert moved(params) == pytest.approx([1.5, 2.0, 100.0], rel=1e-6)
    for how in ("inf", "inf, unscaled by the user"):
        params[0][1].grad, params[1][1].grad = torch.ones(2), torch.tensor([math.inf])
        scale = scaler.get_scale()
        if "user" in how:
            scaler.unscale_(optimizer)
        before = moved(params)
        assert clipper.step(optimizer, scaler=scaler).skipped
        assert moved(params) == before and scaler.get_scale() == scale / 2


@skips.told()
def test_an_overflow_in_one_optimizer_of_two_skips_both_and_backs_off_once():
    params, scaler = scaled([3.0, -4.0], [math.inf]), scaler_of()
    report = distclip.GradClipper(params, 1.0).step(sgd(params[0]), sgd(params[1]), scaler=scaler)
    assert report.skipped and moved(params) == [0, 0, 0]
    assert report.culprits == (("w1", 0, "inf", "w0", None),)
    assert scaler.get_scale() == SCALE / 2


@skips.told()
def test_two_clippers_with_one_scaler():
    """Generator and discriminator: one overflows, the other steps, the scale backs off once."""
    (d, g), scaler = (scaled([math.inf]), scaled([6.0, 8.0])), scaler_of()
    clip_d, clip_g, opt_d, opt_g = (
        distclip.GradClipper(d, 1.0),
        distclip.GradClipper(g, 5.0),
        sgd(*d),
        sgd(*g),
    )
    assert clip_d.step(opt_d, scaler=scaler, update_scaler=False).skipped
    assert not clip_g.step(opt_g, scaler=scaler).skipped
    assert (
        moved(d) == [0]
        and moved(g) == pytest.approx([3.0, 4.0])
        and scaler.get_scale() == SCALE / 2
    )


@pytest.mark.parametrize("how", ["step", "clip_"])
def test_fp16_parameters(how):
    """torch's own unscale_ refuses them."""
    params, scaler = scaled([3.0, -4.0], dtype=torch.float16), scaler_of()
    optimizer, clipper = sgd(*params), distclip.GradClipper(params, 2.5)
    if how == "step":
        clipper.step(optimizer, scaler=scaler)
    else:
        clipper.clip_(optimizer, scaler)
        scaler.step(optimizer)
        scaler.update()
    assert moved(params) == [1.5, -2.0]


def test_the_scale_grows_as_torch_says():
    params, scaler = scaled([1.0]), scaler_of(growth_interval=2)
    optimizer, clipper, scales = sgd(*params), distclip.GradClipper(params, 1e9), []
    for _ in range(5):
        params[0][1].grad = torch.tensor([scaler.get_scale()])
        clipper.step(optimizer, scaler=scaler)
        scales.append(scaler.get_scale())
    assert scales == [1024, 2048, 2048, 4096, 4096] and moved(params) == [5.0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "fused adamw", "fused sgd"])
@skips.told()
def test_clip_of_an_overflow_before_the_users_own_steps(optimizer):
    make = {
        "sgd": lambda ps: torch.optim.SGD(ps, 1.0, momentum=0.9, weight_decay=0.1),
        "adamw": lambda ps: torch.optim.AdamW(ps, 1.0),
        "fused adamw": lambda ps: torch.optim.AdamW(ps, 1.0, fused=True),
        "fused sgd": lambda ps: torch.optim.SGD(ps, 1.0, momentum=0.9, fused=True),
    }[optimizer]
    ends = []
    for overflows in (2, 0):
        params, scaler = scaled([3.0, 4.0]), scaler_of()
        p = params[0][1]
        own, clipper = make([p]), distclip.GradClipper(params, 1.0)
        for step in range(overflows + 3):
            p.grad = torch.tensor([3.0, math.inf if step < overflows else 4.0]) * scaler.get_scale()
            assert clipper.clip_(own, scaler).skipped == (step < overflows)
            scaler.step(own)
            scaler.update()
        ends.append(p.tolist())
        assert scaler.get_scale() == SCALE / 2**overflows
    assert ends[0] == ends[1] != [0, 0]


@skips.told()
def test_raise_waits_for_the_limit_while_a_scaler_looks_for_its_scale():
    params, scaler = scaled([math.inf]), scaler_of()
    clipper = distclip.GradClipper(params, 1.0, on_nonfinite="raise", skip_limit=3)
    for _ in range(3):
        assert clipper.step(sgd(*params), scaler=scaler).skipped
    with pytest.raises(distclip.NonFiniteError) as error:
        clipper.step(sgd(*params), scaler=scaler)
    assert str(error.value) == (
        "step 4: 1 gradient tensor is not finite in 4 steps in a row (skip_limit=3): w0 on rank 0: "
        "inf. Look at the loss, the data and "
        "the learning rate of that step; on_nonfinite='skip' leaves such steps out"
    )
    assert scaler.get_scale() == SCALE / 8


class Other:
    def is_enabled(self):
        return True


def fresh():
    return torch.amp.GradScaler("cpu")


def stepped(optimizer):
    scaler = scaler_of()
    scaler.step(optimizer)
    return scaler


REFUSED = {
    "no optimizer": (
        lambda c, o: c.clip_(scaler=scaler_of()),
        "scaler= needs the optimizer too: a scaler keeps its records by optimizer; use "
        "clip_(optimizer, scaler)",
    ),
    "another kind": (
        lambda c, o: c.step(o, scaler=Other()),
        "scaler is a Other that keeps its records in a way unknown to distclip "
        "(AttributeError(\"'Other' object has no attribute "
        "'_scale'\")); pass a torch.amp.GradScaler or ShardedGradScaler of a torch that distclip "
        "names as supported",
    ),
    "no loss scaled": (
        lambda c, o: c.step(o, scaler=fresh()),
        "this scaler has not scaled a loss yet; call scaler.scale(loss).backward() before clipping",
    ),
    "stepped already": (
        lambda c, o: c.step(o, scaler=stepped(o)),
        "scaler.step() was already called for this optimizer since scaler.update(); clip before it",
    ),
    "nothing to step": (
        lambda c, o: c.step(),
        "step() was given no optimizer; pass those that hold the clipped parameters, or use clip_()",
    ),
    "one twice": (lambda c, o: c.step(o, o), "step() was given one optimizer twice; it would step "
                                             "twice"),
    "grad_scale": (lambda c, o: c.clip_(grad_scale=0.0), "grad_scale=0.0 must be positive and "
                                                         "finite"),
    "a tensor as grad_scale": (
        lambda c, o: c.clip_(grad_scale=torch.tensor(1.0)),
        "grad_scale=tensor(1.) must be positive and finite, a number of Python's",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call, text", REFUSED.values(), ids=REFUSED)
def test_refused(call, text):
    params = scaled([3.0, -4.0])
    with pytest.raises(distclip.ConfigError) as error:
        call(distclip.GradClipper(params, 1.0), sgd(*params))
    assert str(error.value) == text


def test_propagate_with_a_scaler_is_refused():
    params = scaled([3.0, -4.0])
    with pytest.raises(distclip.ConfigError) as error:
        distclip.GradClipper(params, 1.0, on_nonfinite="propagate").step(
            sgd(*params), scaler=scaler_of()
        )
    assert str(error.value) == (
        "on_nonfinite='propagate' and an enabled scaler exclude each other: steps that overflow "
        "must be skipped, else the loss scale could "
        "never back off; use 'skip'"
    )
    assert params[0][1].grad.tolist() == [3 * SCALE, -4 * SCALE]


def test_an_optimizer_of_other_parameters_is_refused():
    """Built before the model was wrapped: it would step the old parameters."""
    params = scaled([3.0, -4.0])
    with pytest.raises(distclip.GradientError) as error:
        distclip.GradClipper(params, 1.0).step(sgd(*scaled([1.0])))
    assert str(error.value) == (
        "step 1: rank 0: optimizer 0 (SGD) holds none of this clipper's parameters (the first of "
        "which is w0); build optimizers after the "
        "model was wrapped and sharded, and pass those that step it"
    )


@skips.told()
def test_a_sharded_scaler_is_told_without_a_message_of_its_own():
    """Without a process group its own unscale_ would fail: nothing of it is called that sends."""
    params, scaler = (
        scaled([3.0, -4.0]),
        ShardedGradScaler("cpu", init_scale=SCALE, process_group=None),
    )
    scaler.scale(torch.ones(()))
    optimizer, clipper = sgd(*params), distclip.GradClipper(params, 2.5)
    clipper.step(optimizer, scaler=scaler)
    params[0][1].grad = torch.tensor([math.nan, 1.0])
    assert clipper.step(optimizer, scaler=scaler).skipped
    assert moved(params) == pytest.approx([1.5, -2.0]) and scaler.get_scale() == SCALE / 2
