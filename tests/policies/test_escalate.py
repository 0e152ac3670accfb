"""The ladder: counts what goes wrong, at steps that are not taken too, says each action once, steps
down by itself, and is equal on all ranks."""

import io
import math

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import distclip
import skips
from late import judged_late
from parity.layouts import given, mesh

INF, NAN = math.inf, math.nan
CALM, SPIKE = 5.0, 500.0


def ladder(*rungs, window=20, policy=None, history=40, **numbers):
    policy = policy or distclip.FixedNorm(1.0)
    return distclip.Escalate(policy, *rungs, window=window, warmup=4, history=history, **numbers)


class Run:
    """One parameter, clipped step by step; the actions of all steps."""

    def __init__(self, policy, late=False, **options):
        self.p = nn.Parameter(torch.zeros(2))
        self.clipper = distclip.GradClipper(
            [("w", self.p)], policy=policy, skip_limit=1000, **options
        )
        judged_late(self.clipper, late)
        self.optimizer = torch.optim.AdamW([self.p], 0.1, fused=True)
        self.actions, self.skipped, self.count = [], [], 0

    def steps(self, *sizes):
        for size in sizes:
            self.count += 1
            self.p.grad = torch.tensor([0.6, 0.8]) * size * (1 + self.count % 3 / 10)
            report = self.clipper.step(self.optimizer)
            self.actions.append(report.action)
            self.skipped.append(bool(report.skipped))
        return self.actions[-len(sizes) :]


WHAT = {"spikes": SPIKE, "not finite": NAN}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("what", WHAT)
@skips.told()
def test_up_the_ladder_and_anew(what, late):
    """Each action once; after `lower_lr` and `roll_back` it is counted anew."""
    run, bad = Run(ladder(2, 3, 7), late), WHAT[what]
    assert set(run.steps(*[CALM] * 8)) == {"none"}
    assert run.steps(bad, CALM, bad, bad) == ["none", "none", "skip", "lower_lr"]
    assert run.steps(CALM, bad, bad, bad) == ["none", "skip", "skip", "lower_lr"]
    assert run.steps(bad, bad, bad) == ["roll_back", "none", "skip"]
    one = what != "spikes"  # a spike is left out from the second on
    assert run.skipped[8:] == [one, False, True, True, False, True, True, True, True, one, True]


@pytest.mark.parametrize("late", [False, True])
@skips.told(least=0)
def test_down_the_ladder(late):
    run = Run(ladder(None, 2, 4, window=6), late)
    run.steps(*[CALM] * 8)
    assert run.steps(SPIKE, SPIKE) == ["none", "lower_lr"]
    assert set(run.steps(*[CALM] * 4)) == {"none"}
    assert run.steps(SPIKE, CALM, SPIKE, SPIKE) == ["none", "none", "lower_lr", "none"]
    assert not any(run.skipped), "without that rung nothing is left out"
    assert run.steps(SPIKE) == ["roll_back"] and run.skipped[-1]


def test_nothing_counts_before_it_knows_what_is_usual():
    """A loss scale that is looked for makes bad steps."""
    with skips.told():
        run = Run(ladder(1, 2, 3))
        assert set(run.steps(NAN, NAN, CALM, NAN, NAN, NAN, CALM, SPIKE, CALM)) == {"none"}
        assert run.steps(CALM, NAN, SPIKE) == ["none", "skip", "lower_lr"]


def test_norms_that_have_risen_for_good_become_usual():
    run = Run(ladder(None, None, 100, window=100, history=16))
    run.steps(*[CALM] * 16)
    said = run.steps(*[SPIKE] * 16)
    assert set(said) == {"none"} and run.clipper._state.policies[0][2].gt(0).sum() == 8


@skips.told()
def test_what_the_policy_leaves_out_counts():
    inner = distclip.SkipSpikes(distclip.FixedNorm(1.0), 3, 16, 4)
    run = Run(ladder(None, 2, None, policy=inner, sigma=1000.0, factor=1e9))
    run.steps(*[CALM] * 8)
    assert run.steps(SPIKE, CALM, SPIKE) == ["none", "none", "lower_lr"]
    assert run.skipped[-3:] == [True, False, True]


@skips.told()
def test_a_loop_may_only_measure():
    """`measure` counts nothing and asks for nothing."""
    run = Run(ladder(1, 2, 3))
    run.steps(*[CALM] * 8)
    run.p.grad = torch.tensor([0.6, 0.8]) * SPIKE
    before = run.clipper.state_dict()
    report = run.clipper.measure()
    assert report.action == "none" and report.to_dict()["action"] == "none"
    after = run.clipper.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("0."))
    assert run.steps(SPIKE) == ["skip"] and run.clipper.last_report.to_dict()["action"] == "skip"
    assert "rung" not in run.clipper.last_report.to_dict()


@pytest.mark.parametrize("late", [False, True])
@skips.told()
def test_what_is_taken_is_not_said_to_be_skipped(late):
    """With "propagate" a bad step counts, and is taken; a spike is left out."""
    run = Run(ladder(1, 3, 4), late, on_nonfinite="propagate")
    run.steps(*[CALM] * 8)
    assert run.steps(SPIKE, NAN, NAN, NAN) == ["skip", "none", "lower_lr", "roll_back"]
    assert run.skipped[-4:] == [True, False, False, False]
    assert run.p.isnan().all()


@pytest.mark.parametrize("late", [False, True])
@skips.told()
def test_counts_are_in_the_checkpoint(late):
    one, other = Run(ladder(1, 3, 4), late), Run(ladder(1, 3, 4), late)
    one.steps(*[CALM] * 8, SPIKE, NAN)
    file = io.BytesIO()
    torch.save(one.clipper.state_dict(), file)
    file.seek(0)
    other.clipper.load_state_dict(torch.load(file, weights_only=True))
    assert one.steps(SPIKE, SPIKE) == other.steps(SPIKE, SPIKE) == ["lower_lr", "roll_back"]


def on_four_ranks():
    """Sharded, with a bad step on one rank alone."""
    name, p = given("w", 40, on=mesh(4), place=[Shard(0)])
    clipper = distclip.GradClipper([(name, p)], policy=ladder(1, 2, 3), sinks=[Quiet()])
    usual, actions = p.grad.clone(), []
    for step in range(14):
        p.grad = usual * (1 + step % 3 / 10)
        if step in (8, 10, 12):
            local = p.grad.to_local()
            if torch.distributed.get_rank() == 2:
                local[1] = {8: NAN, 10: 1e4, 12: INF}[step]
        actions.append(clipper.clip_().action)
    return actions


class Quiet:
    def write(self, report):
        pass


def test_equal_on_all_ranks(ranks):
    answers = ranks.run(on_four_ranks)
    assert answers == [answers[0]] * 4
    assert answers[0][8:] == ["skip", "none", "lower_lr", "none", "roll_back", "none"]


REFUSED = {
    "no rung": (lambda: ladder(None, None, None), "one of them at least is a number"),
    "falling": (lambda: ladder(3, 2, None), "skip=3, lower_lr=2, roll_back=None; they count"),
    "zero": (lambda: ladder(0, 2, None), "from 1, do not fall"),
    "window": (lambda: ladder(1, 2, 30), "window=20 must be a whole number of at least 30"),
    "sigma": (lambda: ladder(1, sigma=0.0), "sigma=0.0 must be positive and factor=2.0 at least"),
    "warm-up": (
        lambda: distclip.Escalate(distclip.FixedNorm(1.0), warmup=200),
        "warmup=200 must be from 2 to history=128",
    ),
    "inside": (
        lambda: distclip.SkipSpikes(ladder(1)),
        r"SkipSpikes: Escalate\(.*; put it outermost: Escalate\(SkipSpikes",
    ),
    "no policy": (lambda: distclip.Escalate(1.0), r"policy=1\.0 has no init and decide"),
}


@pytest.mark.parametrize("make, text", REFUSED.values(), ids=REFUSED)
def test_refused(make, text):
    with pytest.raises(distclip.ConfigError, match=text):
        make()
