"""Slips that would train wrongly without a word: each is told, or cannot happen."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
import skips
from late import judged_late

LEFT = (
    "step 1: rank 0: b has a scaled gradient and is in none of the optimizers that were passed (1 "
    "parameter in all); pass all of the "
    "scaler's optimizers in one call"
)


def two_optimizers():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    a.grad, b.grad = torch.full((2,), 8.0), torch.full((2,), 8.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    return a, b, torch.optim.SGD([a], 1.0), torch.optim.SGD([b], 1.0), scaler


def test_a_scaled_gradient_of_an_optimizer_that_was_not_passed():
    a, b, first, second, scaler = two_optimizers()
    clipper = distclip.GradClipper([("a", a), ("b", b)], math.inf)
    for call in (lambda: clipper.clip_(first, scaler), lambda: clipper.step(first, scaler=scaler)):
        with pytest.raises(distclip.GradientError) as error:
            call()
        assert str(error.value).replace("step 2", "step 1") == LEFT
        assert a.tolist() == [1, 1] and a.grad.tolist() == [8, 8], "nothing was touched"
    clipper.step(first, second, scaler=scaler)
    assert a.tolist() == b.tolist() == [0, 0]


def scales_that_differ():
    _, p = "w", nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0 if dist.get_rank() else 16.0)
    scaler.scale(torch.ones(()))
    optimizer = torch.optim.SGD([p], 1.0)
    try:
        distclip.GradClipper([("w", p)], 1.0).step(optimizer, scaler=scaler)
    except distclip.AgreementError as error:
        return str(error), p.tolist()


def test_scales_that_differ_between_ranks(ranks):
    for text, now in ranks.run(scales_that_differ):
        assert (
            "rank 0: at step 1: step with 1 optimizer, a scaler" in text
            and "scale 16" in text
            and "scale 8" in text
        )
        assert now == [1, 1]


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("waits", [False, True, "device"])
@skips.told()
def test_a_spike_is_left_out_also_where_inf_is_let_through(waits, fused):
    p = nn.Parameter(torch.zeros(1))
    policy = distclip.SkipSpikes(distclip.FixedNorm(1e9), warmup=2, window=8)
    clipper = distclip.GradClipper([("w", p)], policy=policy, on_nonfinite="propagate")
    judged_late(clipper, waits)
    optimizer = torch.optim.SGD([p], 1.0, fused=fused)
    for size in (1.0, 1.1, 0.9, 1000.0):
        p.grad = torch.tensor([size])
        report = clipper.step(optimizer)
    assert bool(report.skipped) and p.item() == pytest.approx(-3.0) and report.norm_after == 0
    p.grad = torch.tensor([1000.0])
    clipper.clip_()
    assert p.grad is None


def decided():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    a.grad = torch.tensor([3.0, 4.0])
    b.grad = a.grad
    return a, b, distclip.GradClipper([("a", a), ("b", b)], 1.0)


def test_apply_clips_once():
    a, b, clipper = decided()
    clipper.decide()
    clipper.apply_([a, b])
    assert a.grad.norm().item() == pytest.approx(1.0), "a gradient that two parameters share"
    with pytest.raises(
        distclip.ConfigError,
        match=r"apply_\(\) got a twice since decide\(\) \(2 "
        r"in all\); it would be clipped twice",
    ):
        clipper.apply_([a, b])


def test_what_was_decided_before_an_error_is_not_applied():
    a, b, clipper = decided()
    clipper.decide()
    a.grad[0] = math.nan
    strict = distclip.GradClipper([("a", a), ("b", b)], 1.0, on_nonfinite="raise")
    for own in (clipper, strict):
        if own is strict:
            with pytest.raises(distclip.NonFiniteError):
                own.decide()
            with pytest.raises(distclip.ConfigError, match="call decide"):
                own.apply_([a, b])


@skips.told()
def test_a_small_p_whose_root_overflows_is_not_finite():
    p = nn.Parameter(torch.zeros(100_000))
    p.grad = torch.ones(100_000)
    report = distclip.GradClipper([("w", p)], 1.0, norm_type=0.01).clip_()
    assert bool(report.skipped) and report.total_norm.isinf() and p.grad is None


def large_doubles():
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    p.grad = torch.full((4,), 1e100, dtype=torch.float64)
    report = distclip.GradClipper([("w", p)], 1.0).clip_()
    return report.total_norm.dtype, report.total_norm.item()


def test_doubles_are_reported_as_doubles(ranks):
    for dtype, norm in ranks.run(large_doubles):
        assert dtype == torch.float64 and norm == pytest.approx(2e100)


@skips.told()
def test_a_report_stays_as_it_was():
    p = nn.Parameter(torch.zeros(1))
    clipper, reports = distclip.GradClipper([("w", p)], 1.0), []
    for size in (math.nan, 1.0, math.nan):
        p.grad = torch.tensor([size])
        reports.append(clipper.clip_())
        reports.append(clipper.measure())
    assert [report.skips.item() for report in reports] == [1, 1, 1, 1, 2, 2]


def test_a_failing_sink_does_not_end_training_where_warnings_are_errors(caplog):
    class Broken:
        def write(self, report):
            raise OSError("gone")

    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.ones(1)
    clipper = distclip.GradClipper([("w", p)], 1.0, sinks=[Broken()])
    clipper.clip_()
    assert "Broken failed at step 1 and is off from now on" in caplog.text


@skips.told()
def out_of_reach():
    p = nn.Parameter(torch.zeros(2))
    p.main_grad = torch.tensor([1.0, math.nan]) if dist.get_rank() == 0 else torch.ones(2)
    own = nn.Parameter(torch.zeros(2))
    own.main_grad = None
    clipper = distclip.GradClipper([("w", p), ("own", own)], 1.0, grad_of=lambda q: q.main_grad)
    try:
        clipper.clip_()
    except distclip.GradientError as error:
        return str(error)


def test_a_skip_that_some_ranks_cannot_do_is_an_error_on_all(ranks):
    for text in ranks.run(out_of_reach):
        assert text.startswith(
            "step 1 is to be skipped, and clip_ cannot take away gradients that "
            "grad_of finds elsewhere"
        )


def test_built_in_inference_mode_it_works_outside():
    p = nn.Parameter(torch.zeros(2))
    with torch.inference_mode():
        clipper = distclip.GradClipper([("w", p)], policy=distclip.ZClip(warmup=2))
    for _ in range(2):
        p.grad = torch.tensor([3.0, 4.0])
        assert clipper.clip_().total_norm == 5


def fused_on_odd_ranks(fold):
    """Three calls; the last only where the second did not end in an error."""
    p = nn.Parameter(torch.zeros(2))
    clipper = judged_late(distclip.GradClipper([("w", p)], 1.0, fold=fold))
    optimizer = torch.optim.SGD([p], 1.0, fused=True if dist.get_rank() % 2 else None)
    for call in (1, 2, 3):
        p.grad = torch.tensor([3.0, 4.0])
        try:
            clipper.step(optimizer)
        except distclip.AgreementError as error:
            return call, str(error), p.tolist()
    return 0, "", p.tolist()


def test_ranks_that_judge_a_step_at_different_calls(ranks):
    found = ranks.run(fused_on_odd_ranks, "auto")
    assert [call for call, _, _ in found] == [1, 2, 1, 2], (
        "those that fold learn of it one call late"
    )
    for _, text, now in found:
        assert now == [0, 0], "nothing moved"
        assert (
            "rank 0,2: at step 1: step with 1 optimizer, after decision" in text
            and "rank 1,3: at step 1: step with 1 optimizer (all fold; fold='never' if not on every "
            "rank), after decision"
            in text
        ), text
    for call, _, now in ranks.run(fused_on_odd_ranks, "never"):
        assert call == 0 and now == pytest.approx([-1.8, -2.4])


def nothing_to_step_on_rank_1(fused):
    """At the second call rank 1 has no optimizer; a collective of its own follows each."""
    p = nn.Parameter(torch.zeros(2))
    clipper = judged_late(distclip.GradClipper([("w", p)], 1.0))
    optimizer = torch.optim.SGD([p], 1.0, fused=fused)
    for call in (1, 2, 3):
        p.grad = torch.tensor([3.0, 4.0])
        try:
            clipper.step(*((None,) if call == 2 and dist.get_rank() == 1 else (optimizer,)))
        except distclip.AgreementError as error:
            return call, str(error), p.tolist()
        dist.all_reduce(torch.zeros(1000))
    return 0, "", p.tolist()


@pytest.mark.parametrize("fused, at", [(True, 3), (None, 2)])
def test_a_rank_without_an_optimizer_judges_the_step_with_the_others(ranks, fused, at):
    for call, text, now in ranks.run(nothing_to_step_on_rank_1, fused):
        assert call == at and "rank 1: at step 2: step [step() was given None" in text, text
        assert now == pytest.approx([-0.6, -0.8]), "the first alone was taken"


def test_a_missing_optimizer_is_told_at_once():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    clipper = judged_late(distclip.GradClipper([("w", p)], 1.0))
    with pytest.raises(distclip.ConfigError, match="was given no optimizer"):
        clipper.step()


def test_what_every_rank_got_wrong_is_told_at_once_after_a_step_that_is_judged_late():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    clipper = judged_late(distclip.GradClipper([("w", p)], 1.0))
    clipper.step(torch.optim.SGD([p], 1.0, fused=True))
    with pytest.raises(distclip.ConfigError, match="was given no optimizer"):
        clipper.step()


def measured(late, wrong, then):
    """A word that `measure` does not know, on some ranks, and a collective of the training's own
    before the next call: at which call each learns of it."""
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    clipper = judged_late(distclip.GradClipper([("w", p)], 1.0), late)
    call = 1
    try:
        clipper.measure(of="bogus" if dist.get_rank() in wrong else "grad")
        total = torch.ones(1000)
        dist.all_reduce(total)
        assert total.eq(4).all()
        call = 2
        getattr(clipper, then)()
    except distclip.DistclipError as error:
        return call, f"{type(error).__name__}: {error}", p.grad.tolist()
    return 0, "", p.grad.tolist()


@pytest.mark.parametrize("then", ["measure", "clip_", "audit", "rebuild"])
@pytest.mark.parametrize("late", [False, True, "device"])
def test_a_wrong_measure_on_one_rank_is_an_error_on_all(ranks, late, then):
    found = ranks.run(measured, late, [3], then)
    for call, text, grad in found:
        # on a device the host decides at once what a constant threshold leaves to nobody else
        assert call == (2 if late == "device" else 1) and grad == [3.0, 4.0]
        assert text == found[0][1] and text.startswith("AgreementError: ranks did not do the same")
        assert "rank 0-2: at step 1: measure, after" in text
        assert (
            "rank 3: at step 1: measure [measure(of='bogus'): it is 'grad' or 'param'], a" in text
        )


@pytest.mark.parametrize("late", [False, True, "device"])
def test_a_wrong_measure_on_all_ranks_is_told_at_once(ranks, late):
    wanted = (1, "ConfigError: measure(of='bogus'): it is 'grad' or 'param'", [3.0, 4.0])
    assert ranks.run(measured, late, range(4), "measure") == [wanted] * 4


def more_on_rank_1():
    """Warnings are errors here."""
    p, more = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.SGD([p, *([more] if dist.get_rank() == 1 else [])], 1.0)
    p.grad, more.grad = torch.ones(2), torch.ones(2)
    clipper = distclip.GradClipper([("w", p)], math.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clipper.step(optimizer)
    return p.tolist(), more.tolist()


def test_what_one_rank_alone_is_told_does_not_end_it_where_warnings_are_errors(ranks):
    assert ranks.run(more_on_rank_1) == [([0, 0], [r != 1] * 2) for r in range(4)]


def rebuilt_after_copies_differed():
    p = nn.Parameter(torch.ones(2))
    clipper = judged_late(distclip.GradClipper([("w", p)], 1.0))
    optimizer = torch.optim.SGD([p], 1.0, fused=True)
    p.grad = torch.full((2,), 2.0 if dist.get_rank() == 1 else 1.0)
    clipper.step(optimizer)
    try:
        clipper.rebuild()
    except distclip.AgreementError as error:
        text = str(error)
    clipper.rebuild()
    p.grad = torch.full((2,), 0.5)
    clipper.step(optimizer)
    return text, p.tolist()


def test_a_step_that_was_not_judged_yet_is_judged_when_the_clipper_is_rebuilt(ranks):
    for text, now in ranks.run(rebuilt_after_copies_differed):
        assert text.startswith("step 1: ") and "w" in text and "rank 1" in text, text
        assert now == [0.5, 0.5], "the first step was not taken"
