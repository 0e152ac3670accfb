"""Thresholds from the norms of a run: candidates and one recommendation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from distclip.cli.norm_history import NormHistory
from distclip.cli.run_log import RunLog

PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 100.0)
FEW_STEPS = 100  # with fewer steps percentiles mean little
MANY_SKIPPED = 0.2  # share of the steps: what is left is no picture of the run
_USUAL_PERCENTILE = 95.0
_MOST_LENGTHENED = math.log(1.1)  # mean growth of the steps' lengths that changes no learning rate
_MANY_CLIPPED = 0.2  # share of a whole run's steps: more than spikes
_AS_IT_WAS = 1.15  # a bound within this factor of the threshold that it had: that one
_LONGER = 1.001
_SAMPLED = 20_000  # steps by which a bound is sought


@dataclass(frozen=True)
class NormCandidate:
    """A max_norm, and what it would have done to this run."""

    percentile: float
    max_norm: float  # rounded to 2 digits; the shares are those of the rounded number
    share: float  # of the steps with a finite norm, that it would have clipped
    longer_share: float  # of the steps taken, that would have been longer than they were
    longer_factor: float  # the median of their growth; 1 where there are none
    recommended: bool = False


@dataclass(frozen=True)
class NormAdvice:
    max_norm: float | None  # None where the run gives no ground for one
    reason: str

    @property
    def setting(self) -> str:
        """As it is written in Python, or "none"."""
        return "none" if self.max_norm is None else f"max_norm={self.max_norm:g}"


def round_significant(value: float, digits: int = 2, up: bool = False) -> float:
    """Rounded to `digits` significant digits; with `up` never below the value."""
    near = float(f"{value:.{digits}g}")
    if up and near < value:
        near = float(f"{near + 10.0 ** (math.floor(math.log10(value)) - digits + 1):.{digits}g}")
    return near


def fixed_limit(run: RunLog) -> float | None:
    """The threshold of the norm, where it was one all the time."""
    known = run.threshold[np.isfinite(run.threshold)]
    if run.clamps or len(run.groups) > 1 or not len(known) or known.min() < known.max():
        return None
    return float(known[0])


def growth(run: RunLog, bound: float) -> tuple[float, float]:
    """How a threshold would have lengthened the steps that were taken: the share of those that
    would have been longer, and the median factor among them (1 where there are none)."""
    ratio = _growths(run, bound)
    longer = ratio[ratio > _LONGER]
    return (len(longer) / len(ratio), float(np.median(longer))) if len(longer) else (0.0, 1.0)


def find_candidates(run: RunLog, recommended: float | None) -> list[NormCandidate]:
    """Percentiles of the finite norms before clipping, interpolated linearly, and the recommended
    value among them. Empty where no norm is finite."""
    norms = run.norm[run.finite]
    if not len(norms):
        return []
    rows = [
        (percentile, round_significant(float(value), up=percentile == 100))
        for percentile, value in zip(PERCENTILES, np.percentile(norms, PERCENTILES))
    ]
    if recommended is not None and recommended not in [bound for _, bound in rows]:
        rows.append((round(100 * float((norms <= recommended).mean()), 1), recommended))
    marked = recommended if recommended is not None else math.nan
    candidates: list[NormCandidate] = []
    for percentile, bound in sorted(rows, key=lambda row: (row[1], row[0])):
        longer_share, longer_factor = growth(run, bound)
        candidates.append(
            NormCandidate(
                percentile=percentile,
                max_norm=bound,
                share=float((norms > bound).mean()),
                longer_share=longer_share,
                longer_factor=longer_factor,
                recommended=bound == marked,
            )
        )
    return candidates


def recommend_max_norm(history: NormHistory) -> NormAdvice:
    """One max_norm: the 95th percentile of the ordinary steps, or less where that would change the
    learning rate.

    Of a run that was clipped the threshold is a part of the learning rate, the more so the more
    steps it clipped. So the bound is the largest, up to that percentile, that lengthens the run's
    steps by at most 10 % on average: the percentile where few steps were clipped, what it had where
    most were, and something between them else.
    """
    run = history.run
    refusal = _no_ground(history)
    if refusal:
        return NormAdvice(None, refusal)
    used, where = _ordinary_steps(history)
    norms = run.norm[used]
    usual = float(np.percentile(norms, _USUAL_PERCENTILE))
    bound = _longest_bound(run, used, usual)
    had = fixed_limit(run)
    if had is not None and bound < usual and had <= bound <= _AS_IT_WAS * had:
        bound = had
    else:
        # up, where nothing forbids: just below the percentile it would clip many more
        bound = round_significant(bound, up=bound >= usual)
    clipped = float((norms > bound).mean())
    if bound >= round_significant(usual):
        reason = (
            f"the 95th percentile{where}: ordinary steps pass, {percent(clipped)} would have been "
            f"clipped there" + _from_the_start(run, used, bound)
        )
    elif bound == had:
        reason = "what it had" + _what_higher_does(run, usual, where)
    else:
        reason = "about as long steps as this run took" + _what_higher_does(run, usual, where)
    return NormAdvice(bound, reason)


def percent(share: float) -> str:
    """0.0432 → "4.3 %", two digits, never 0 or 100 of what is not all."""
    if 0 < share < 0.001:
        return "under 0.1 %"
    if 0.999 < share < 1:
        return "over 99.9 %"
    return (
        f"{100 * share:.0f} %"
        if 0.0995 <= share <= 0.99 or share in (0, 1)
        else f"{100 * share:.1f} %"
    )


def times(factor: float) -> str:
    """Two digits: 3,300, 12, 2.3; three next to 1."""
    if factor >= 1e6:
        return f"{factor:.2g}"
    if factor >= 9.95:
        return f"{round_significant(factor):,.0f}"
    return f"{factor:.3g}" if 0.9 < factor < 1.1 else f"{factor:.2g}"


def two_digits(value: float) -> str:
    """130, 1.3, 0.013."""
    return f"{round_significant(value):g}"


def _no_ground(history: NormHistory) -> str:
    run = history.run
    num_sane = int(history.sane.sum())
    skipped = float(run.skipped.mean())
    if len(run) >= FEW_STEPS and skipped >= MANY_SKIPPED:
        return (
            f"{percent(skipped)} of the steps were skipped; find out why first, then log another "
            f"run"
        )
    if num_sane < FEW_STEPS:
        before = ", before the run was lost," if history.divergence is not None else ""
        what = "1 step" if num_sane == 1 else f"{num_sane} steps"
        return f"{what} with a finite norm{before} are too few; log at least {FEW_STEPS}"
    if float(np.median(run.norm[history.sane])) <= 0:
        return "at least half of the norms are 0"
    return ""


def _ordinary_steps(history: NormHistory) -> tuple[Any, str]:
    """[steps] bool: finite ones of the part of the run that tells what comes, without spikes; and
    which part that is."""
    run, used, where = history.run, history.sane.copy(), ""
    used[history.spikes] = False
    if history.divergence is not None:
        where = " of the steps before it was lost"
    start: int | None = None
    if history.settled_from is not None:
        start, where = history.settled_from, " of the steps after it settled"
    elif history.legs:
        at = np.flatnonzero(used)
        start = int(run.step[at[2 * len(at) // 3]])
        where = " of the last third of the run, since the norm drifts"
    if start is not None:
        late = used & (run.step >= start)
        if late.sum() >= FEW_STEPS // 2:
            return late, where
    return used, where if history.divergence is not None else ""


def _longest_bound(run: RunLog, used: Any, usual: float) -> float:
    """The largest bound up to `usual` under which the steps that were taken grow by at most 10 % on
    average."""
    at = np.flatnonzero(used & ~run.skipped & (run.after > 0))
    at = at[:: max(1, len(at) // _SAMPLED)]
    if not len(at):
        return usual
    norm, after = run.norm[at], run.after[at]

    def mean_growth(bound: float) -> float:
        return float(np.log(np.maximum(np.minimum(norm, bound) / after, 1)).mean())

    if mean_growth(usual) <= _MOST_LENGTHENED:
        return usual
    low, high = math.log(float(after.min())), math.log(usual)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if mean_growth(math.exp(middle)) <= _MOST_LENGTHENED else (low, middle)
        )
    return math.exp(low)


def _from_the_start(run: RunLog, used: Any, bound: float) -> str:
    """What a bound of late steps does to a run that begins anew."""
    norms = run.norm[run.finite]
    share = float((norms > bound).mean())
    if used.sum() == len(norms) or share < _MANY_CLIPPED:
        return ""
    whole = round_significant(float(np.percentile(norms, _USUAL_PERCENTILE)), up=True)
    return (
        f". Of the whole run it would have clipped {percent(share)}: where this run goes on take "
        f"it, for one that begins anew {whole:g} or a policy that adapts"
    )


def _what_higher_does(run: RunLog, usual: float, where: str) -> str:
    higher = round_significant(usual)
    share, factor = growth(run, higher)
    return (
        f": its threshold was a part of the learning rate. A higher one, such as {higher:g} (the "
        f"95th percentile{where}), lengthens {percent(share)} of the steps by {times(factor)} "
        f"times; lower the learning rate by as much if you take it"
    )


def _growths(run: RunLog, bound: float) -> Any:
    """[steps taken]: length under `bound` over the length that it had."""
    taken = run.finite & ~run.skipped & (run.after > 0)
    if not taken.any():
        return np.ones(1)
    return np.minimum(run.norm[taken], bound) / run.after[taken]
