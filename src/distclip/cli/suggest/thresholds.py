"""Thresholds from the norms of a run: candidates, one recommendation, and warnings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distclip.cli.run_log import RunLog

PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 100.0)
_SPIKE_RATIO = 10.0  # times the running median
_MEDIAN_WINDOW = 101  # steps of the running median, centred
_FEW_STEPS = 100  # with fewer steps percentiles mean little
_DRIFT_RATIO = 2.0  # median of the last third over that of the first, or its inverse
_BLOWN_UP_RATIO = (
    1000.0  # times the running median: after such a spike a model seldom recovers by itself
)
_ALWAYS_SHARE = 0.95  # share of clipped steps
_BENT_COSINE = 0.9  # cosine between raw and clipped gradient


@dataclass(frozen=True)
class Candidate:
    """A max_norm and the share of the steps that it would have clipped."""

    percentile: float
    max_norm: float  # rounded to 4 digits; the share is that of the rounded number
    share: float


@dataclass(frozen=True)
class Recommendation:
    max_norm: float | None  # None where the run gives no ground for one
    reason: str

    @property
    def setting(self) -> str:
        """As it is written in Python, or "none"."""
        return "none" if self.max_norm is None else f"max_norm={self.max_norm:g}"


def round_significant(value: float, digits: int = 4, up: bool = False) -> float:
    """Rounded to `digits` significant digits; with `up` never below the value."""
    near = float(f"{value:.{digits}g}")
    if up and near < value:
        near = float(f"{near + 10.0 ** (math.floor(math.log10(value)) - digits + 1):.{digits}g}")
    return near


def find_candidates(run: RunLog) -> list[Candidate]:
    """Percentiles of the finite norms before clipping, interpolated linearly. Empty where there are
    none."""
    norms = run.norm[run.finite]
    out: list[Candidate] = []
    for percentile in PERCENTILES if len(norms) else ():
        bound = round_significant(percentile_of(norms, percentile), up=percentile == 100)
        out.append(Candidate(percentile, bound, float((norms > bound).double().mean())))
    return out


def recommend_max_norm(run: RunLog) -> Recommendation:
    """One max_norm.

    The 95th percentile of the late norms, or less where spikes reach down to it. Of a run that was
    clipped at nearly every step, the median norm after clipping: there the threshold acts as a part
    of the learning rate.
    """
    norms = run.norm[run.finite]
    if (blown := _blown_up(run)) is not None:
        return Recommendation(
            None,
            f"the run blew up at step {blown} and its norms tell nothing; log one that is clipped, "
            "say at 1",
        )
    late, where = norms, ""
    if _norm_drift(norms) is not None:
        late, where = (
            norms[2 * len(norms) // 3 :],
            " of the last third of the run, since the norm drifts",
        )
    middle = percentile_of(late, 50) if len(late) else 0.0
    if middle <= 0:
        return Recommendation(None, "at least half of the norms are 0")
    lengths = run.after[run.finite & run.clipped & ~run.skipped]
    if (
        _clipped_share(run) > _ALWAYS_SHARE
        and len(lengths)
        and (length := percentile_of(lengths, 50)) > 0
    ):
        times = round_significant(percentile_of(norms, 50) / length, 3)
        reason = (
            f"the length of this run's clipped steps; norms were {times:g} times that, so "
            f"anything higher lengthens nearly every step"
        )
        return Recommendation(
            round_significant(length), f"{reason}: lower the learning rate by as much"
        )
    for percentile in (95.0, 90.0, 75.0, 50.0):
        bound = round_significant(percentile_of(late, percentile))
        if bound <= _SPIKE_RATIO * middle:
            break
    clipped = float((late > bound).double().mean())
    reason = (
        f"the {percentile:g}th percentile{where}: ordinary steps pass, {clipped:.1%} would "
        f"have been clipped there"
    )
    if percentile < 95:
        reason += "; spikes are so frequent that higher percentiles lie among them"
    return Recommendation(bound, reason)


def find_warnings(run: RunLog) -> Iterator[str]:
    """What a reader of this run should know, in plain words."""
    steps, finite = len(run.step), run.finite
    norms = run.norm[finite]
    if steps < _FEW_STEPS:
        yield (
            f"only {steps} steps: percentiles above {100 - 100 // max(steps, 1)} are the largest "
            f"step or two; log at least {_FEW_STEPS}"
        )
    if (bad := steps - len(norms)) > 0:
        yield (
            f"{bad} of {steps} steps had norms that are not finite; they are left out of all "
            f"percentiles"
        )
    if len(run.groups) > 1:
        yield (
            f"this run clipped {len(run.groups)} groups by norms of their own; what is said here "
            f"is of the norm over all of them"
        )
    yield from _about_rate(run)
    yield from _about_spikes(run)
    bent = run.cosine[run.cosine < _BENT_COSINE]
    if len(bent):
        yield (
            f"value clipping bends the direction: at {len(bent) / steps:.1%} of the steps the "
            f"cosine between raw and clipped gradient is below {_BENT_COSINE}, down to "
            f"{float(bent.min()):.2g}; a norm threshold keeps the direction"
        )
    if (ratio := _norm_drift(norms)) is not None:
        way = (
            f"rises {ratio:.3g}-fold"
            if ratio > 1
            else f"falls to {ratio:.0%}"
            if ratio > 0.005
            else f"falls to {ratio:.1e} of that"
        )
        yield (
            f"the median norm {way} from the first to the last third of the run: one fixed "
            "threshold does not fit both; look at AutoClip, ZClip or Scheduled"
        )


def _about_rate(run: RunLog) -> Iterator[str]:
    if not any(math.isfinite(limit) for limit in run.limits):
        return
    rate = _clipped_share(run)
    what = "value clipping acted" if run.clamps else "the run was clipped"
    if rate > _ALWAYS_SHARE:
        yield (
            f"{what} at {rate:.1%} of the steps: the threshold sets the length of nearly every "
            f"step and is no safety net"
        )
    elif rate == 0:
        yield "the run was never clipped: its threshold was above every norm and did nothing"


def _about_spikes(run: RunLog) -> Iterator[str]:
    at = find_spikes(run)
    if not len(at):
        return
    worst = int(at[run.norm[at].argmax()])
    times = float(run.norm[worst] / _running_median(run.norm)[worst])
    steps = ", ".join(str(int(run.step[i])) for i in at[:5]) + (", …" if len(at) > 5 else "")
    count = "1 step has a norm" if len(at) == 1 else f"{len(at)} steps have norms"
    hidden = "; clipping hides that, look at their data" if bool(run.clipped[at].any()) else ""
    largest = f"the largest {times:.3g} times, at step {int(run.step[worst])}"
    yield (
        f"{count} above {_SPIKE_RATIO:g} times the running median (step {steps}; {largest}){hidden}"
    )


def _clipped_share(run: RunLog) -> float:
    return float(run.clipped.double().mean())


def _blown_up(run: RunLog) -> int | None:
    """The step of the largest norm, where it is a spike of more than 1000 times the running median
    that was neither clipped nor skipped."""
    at = find_spikes(run)
    held = run.clipped[at] | run.skipped[at]
    beyond = at[~held & (run.norm[at] > _BLOWN_UP_RATIO * _running_median(run.norm)[at])]
    return int(run.step[beyond[run.norm[beyond].argmax()]]) if len(beyond) else None


def find_spikes(run: RunLog) -> Tensor:
    """[n] int64: positions whose norm is above 10 times the median of the 101 steps around."""
    return (run.finite & (run.norm > _SPIKE_RATIO * _running_median(run.norm))).nonzero().flatten()


def _running_median(norms: Tensor) -> Tensor:
    """[steps]: median of the finite norms among the 101 nearest; at both ends those of the first
    and last 101."""
    width = min(_MEDIAN_WINDOW, len(norms))
    inside = norms.unfold(0, width, 1).nanmedian(1).values
    before = width // 2
    return torch.cat(
        [inside[:1].expand(before), inside, inside[-1:].expand(len(norms) - len(inside) - before)]
    )


def _norm_drift(norms: Tensor) -> float | None:
    """Median of the last third divided by that of the first, where it is at least 2 or at most 1/2;
    otherwise None."""
    third = len(norms) // 3
    if 3 * third < _FEW_STEPS // 2:
        return None
    first, last = percentile_of(norms[:third], 50), percentile_of(norms[-third:], 50)
    if first <= 0 or last <= 0 or 1 / _DRIFT_RATIO < last / first < _DRIFT_RATIO:
        return None
    return last / first


def percentile_of(norms: Tensor, percentile: float) -> float:
    """Interpolated linearly between the two nearest, as NumPy does; of any number of steps."""
    ordered = norms.sort().values
    place = (len(ordered) - 1) * percentile / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))
