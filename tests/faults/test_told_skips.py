"""A step that is skipped is never silent: without a sink it is told at the first of a streak, on
all ranks alike."""

import math
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from late import judged_late
from parity.layouts import given

BAD = (
    "step 2 is skipped: 1 gradient tensor is not finite: w on rank 0: NaN. Nothing was changed by "
    "it and training goes on; more than "
    "skip_limit=20 such steps in a row are an error. Told once a streak; "
    "sinks=[distclip.LoggingSink()] reports every step"
)
OVERFLOW = (
    "step 2 is skipped: 1 gradient tensor is not finite: w on rank 0: inf. Nothing was changed by "
    "it and training goes on; more than "
    "skip_limit=20 such steps in a row are an error. The loss scale is lowered; it finds its "
    "height by such steps, and further ones are "
    "not told (report.skips counts them)"
)
SPIKE = (
    "step 6 is skipped: its norm is so far from those before that the policy leaves it out. "
    "Nothing was changed by it and training goes "
    "on; more than skip_limit=20 such steps in a row are an error. Told once a streak; "
    "sinks=[distclip.LoggingSink()] reports every step"
)


def told(values, waits=False, scaled=False, how="step", **options):
    """The warnings of these steps, one list a call."""
    p = nn.Parameter(torch.zeros(1))
    clipper = distclip.GradClipper(
        [("w", p)], **({} if "policy" in options else {"max_norm": 1.0}) | options
    )
    judged_late(clipper, waits)
    optimizer = torch.optim.SGD([p], 0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
    rows = []
    for value in values:
        scaler.scale(torch.ones(()))
        p.grad = torch.tensor([value])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if how == "decide":
                clipper.decide()
            elif how == "clip_":
                clipper.clip_(optimizer, scaler)
                scaler.step(optimizer)
                scaler.update()
            else:
                clipper.step(optimizer, scaler=scaler)
        rows.append([str(w.message) for w in caught])
        assert all(w.category is RuntimeWarning and w.filename == __file__ for w in caught), (
            "it points at the caller's line"
        )
    return rows


STREAKS = (1.0, math.nan, math.nan, 1.0, math.nan)


@pytest.mark.parametrize("how", ["step", "clip_", "decide"])
def test_once_a_streak(how):
    assert told(STREAKS, how=how) == [[], [BAD], [], [], [BAD.replace("step 2", "step 5")]]


def test_one_call_late_where_the_host_waits_for_nothing():
    assert told((*STREAKS, 1.0), waits=True) == [
        [],
        [],
        [BAD],
        [],
        [],
        [BAD.replace("step 2", "step 5")],
    ]


@pytest.mark.parametrize("mode", ["skip", "raise"])
def test_a_scalers_search_is_told_once(mode):
    rows = told((1.0, math.inf, math.inf, 1.0, math.inf), scaled=True, on_nonfinite=mode)
    assert rows == [[], [OVERFLOW], [], [], []]


SPIKES = (1.0, 1.1, 0.9, 1.0, 1.0, 100.0, 100.0, 1.0, 100.0)


@pytest.mark.parametrize("mode", ["skip", "propagate"])
def test_what_a_policy_leaves_out(mode):
    policy = distclip.SkipSpikes(distclip.FixedNorm(1e9), warmup=4, window=8)
    assert told(SPIKES, policy=policy, on_nonfinite=mode) == [[]] * 5 + [
        [SPIKE],
        [],
        [],
        [SPIKE.replace("step 6", "step 9")],
    ]


def test_what_is_let_through_is_not_told():
    assert told(STREAKS, on_nonfinite="propagate") == [[]] * 5


class Kept:
    def __init__(self):
        self.skipped = []

    def write(self, report):
        self.skipped.append(bool(report.skipped))


def test_a_sink_tells_it():
    sink = Kept()
    assert told(STREAKS, sinks=[sink]) == [[]] * 5 and sink.skipped == [
        False,
        True,
        True,
        False,
        True,
    ]


def on_ranks(sinks):
    name, p = given("w", 4)
    first = dist.get_rank() == 0
    clipper = distclip.GradClipper(
        [(name, p)],
        1.0,
        sinks=[Kept()] if sinks == "on all" or (sinks == "on the first" and first) else (),
    )
    p.grad[1] = math.inf if dist.get_rank() == 2 else p.grad[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = clipper.clip_()
    return bool(report.skipped), [str(w.message) for w in caught]


@pytest.mark.parametrize("sinks", ["nowhere", "on the first", "on all"])
def test_ranks_tell_alike(ranks, sinks):
    """Reports go to the first rank's sinks alone, so it is these that count."""
    for skipped, texts in ranks.run(on_ranks, sinks):
        assert skipped and len(texts) == (sinks == "nowhere")
        assert all(
            re.match(
                r"step 1 is skipped: 1 gradient tensor is not finite: w on rank 2: "
                r"inf\. ",
                text,
            )
            for text in texts
        )


def as_errors():
    name, p = given("w", 4)
    clipper = distclip.GradClipper([(name, p)], 1.0)
    p.grad[1] = math.nan if dist.get_rank() == 2 else p.grad[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            clipper.clip_()
        except RuntimeWarning as warning:
            return str(warning)[:17]


def test_where_warnings_are_errors_all_ranks_raise(ranks):
    assert ranks.run(as_errors) == ["step 1 is skipped"] * 4
