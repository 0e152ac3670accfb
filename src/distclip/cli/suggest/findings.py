"""What a reader of a run should know, in plain words, the most important first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from distclip.cli.norm_history import NormHistory
from distclip.cli.run_log import RunLog
from distclip.cli.suggest.advice import FEW_STEPS, fixed_limit, percent, times, two_digits

_WORTH_FIRST = 0.01  # share of skipped steps
_START_STEPS = 0.02  # of the run: a loss scale has found its size by then
_MOST_STEPS_CLIPPED = 0.5
_AS_BEFORE = 1.5  # median after a spike over the one before
_MOST_OF_IT = 0.5  # share of a layer that is worth a word
_BENT_COSINE = 0.9  # cosine between raw and clipped gradient


@dataclass(frozen=True)
class LogFinding:
    # "skipped", "few", "diverged", "trend", "period", "spikes", "rank", "rate", "groups" or "bent"
    kind: str
    text: str


def find_findings(history: NormHistory) -> list[LogFinding]:
    """The most important first: many skipped steps, then what makes the norms useless, then the
    rest."""
    run = history.run
    many = float(run.skipped.mean()) >= _WORTH_FIRST
    skipped = list(_about_skips(run))
    found = [LogFinding("skipped", text) for text in skipped] if many else []
    found += [LogFinding("few", text) for text in _about_length(run)]
    found += [LogFinding("diverged", text) for text in _about_divergence(history)]
    found += [LogFinding("trend", text) for text in _about_trend(history)]
    found += [LogFinding("period", text) for text in _about_period(history)]
    found += [LogFinding("spikes", text) for text in _about_spikes(history)]
    found += [LogFinding("rank", text) for text in _about_ranks(history)]
    found += [LogFinding("rate", text) for text in _about_rate(run)]
    if len(run.groups) > 1:
        found.append(
            LogFinding(
                "groups",
                f"this run clipped {len(run.groups)} groups by norms of their own; what is said "
                f"here is of the norm over all of them",
            )
        )
    found += [LogFinding("bent", text) for text in _about_cosine(run)]
    return found + ([] if many else [LogFinding("skipped", text) for text in skipped])


def _about_skips(run: RunLog) -> Iterator[str]:
    steps, num = len(run), int(run.skipped.sum())
    bad = int((~run.finite).sum())
    if not num:
        if bad:
            yield (
                f"{bad:,} of {steps:,} steps had norms that are not finite and were taken all the "
                f"same; they are left out of all percentiles"
            )
        return
    overflowed = int((run.skipped & (~run.finite | (run.nonfinite > 0))).sum())
    at = np.flatnonzero(run.skipped)
    differed = sum(run.details_of(int(i)).differs for i in at)
    left_out = num - overflowed - differed
    causes = [f"{overflowed:,} with gradients that were not finite"] * bool(overflowed)
    causes += [f"{differed:,} with copies of gradients that differed"] * bool(differed)
    causes += [f"{left_out:,} by the policy"] * bool(left_out)
    text = f"{num:,} of {steps:,} steps ({percent(num / steps)}) were skipped: {', '.join(causes)}"
    if overflowed == num and at[-1] < _START_STEPS * steps:
        yield (
            f"{text}; all within the first {int(at[-1]) + 1}, as where a loss scale finds its size"
        )
        return
    who = next((run.details_of(int(i)).culprits for i in at if run.details_of(int(i)).culprits), ())
    named = f"; the first: {who[0]}" if who else ""
    yield f"{text}{named}. No threshold cures that: find their cause first"


def _about_length(run: RunLog) -> Iterator[str]:
    if (steps := len(run)) < FEW_STEPS:
        yield (
            f"only {steps} step{'s' if steps > 1 else ''}: percentiles say little; log at least "
            f"{FEW_STEPS}"
        )


def _about_divergence(history: NormHistory) -> Iterator[str]:
    run, found = history.run, history.divergence
    if found is None:
        return
    step = int(run.step[min(found.at, len(run) - 1)])
    if found.killed:
        before = (
            f"the median norm was {two_digits(found.before)} before and {two_digits(found.after)} "
            f"after it"
            if math.isfinite(found.before)
            else "there are next to no steps before it"
        )
        yield (
            f"step {step:,} had {times(found.ratio)} times the running median and nothing clipped "
            f"it; {before}: the model may be dead since. Does the loss still fall? Log a run that "
            f"is clipped, say at 1"
        )
    elif math.isnan(found.after):
        yield f"the run diverged at step {step:,}: no norm is finite from there on"
    else:
        yield (
            f"the run diverged at step {step:,}: the median norm was {two_digits(found.before)} "
            f"before and {two_digits(found.after)} from there on. What follows does not count here"
        )


def _about_trend(history: NormHistory) -> Iterator[str]:
    legs = history.legs
    if not legs:
        return
    if (settled := history.settled_from) is not None:
        yield (
            f"the median norm starts at {two_digits(legs[0].start)} and keeps to "
            f"{two_digits(legs[0].end)} from step {settled:,} on; a threshold for the rest clips "
            f"most of the first steps, which Warmup or Scheduled avoids"
        )
        return
    remedy = "one fixed threshold does not fit all of it; look at AutoClip, ZClip or Scheduled"
    levels = [legs[0].start, *(leg.end for leg in legs)]
    if len(legs) > 2:
        yield (
            f"the median norm goes up and down between {two_digits(min(levels))} and "
            f"{two_digits(max(levels))} ({len(legs) - 1} turns): {remedy}"
        )
        return
    ways = ["rises" if leg.end > leg.start else "falls" for leg in legs]
    text = (
        f"the median norm {ways[0]} from {two_digits(legs[0].start)} to {two_digits(legs[0].end)}"
    )
    if len(legs) == 2:
        text += f" by step {legs[0].last_step:,}, then {ways[1]} to {two_digits(legs[1].end)}"
    yield f"{text}: {remedy}"


def _about_period(history: NormHistory) -> Iterator[str]:
    if (period := history.period) is not None:
        yield (
            f"spikes come back every {period:,} steps: what else does, at the end of an epoch, an "
            f"evaluation, a checkpoint, or in the order of the data?"
        )


def _about_spikes(history: NormHistory) -> Iterator[str]:
    run, at = history.run, history.spikes
    if not len(at):
        return
    events = sorted(history.events, key=lambda event: -float(run.norm[event.worst]))
    worst = events[0]
    ratio = float(history.ratio[worst.worst])
    limit = f"{two_digits(history.spike_ratio)} times the running median"
    if len(at) == 1:
        text = (
            f"one spike, {times(ratio)} times the running median, at step {int(run.step[at[0]]):,}"
        )
    else:
        steps = ", ".join(f"{int(step):,}" for step in run.step[at[:5]])
        text = (
            f"{len(at):,} steps have norms above {limit} (step {steps}{', …' * (len(at) > 5)}; the "
            f"largest {times(ratio)} times, at step {int(run.step[worst.worst]):,})"
        )
    held = bool((run.clipped[at] | run.skipped[at]).all())
    before, after = history.around(worst)
    if history.divergence is None and not math.isnan(before) and not math.isnan(after):
        text += (
            f"; median norm {two_digits(before)} before the largest, {two_digits(after)} after it"
        )
        if after < _AS_BEFORE * before:
            text += ": the run went on as before"
    text += _where_it_came_from(run, worst.worst)
    if held:
        text += ". Clipping hides that: look at their data"
    yield text


def _where_it_came_from(run: RunLog, at: int) -> str:
    """The layer and the rank of a spike, where one has most of it."""
    top, share, rank = int(run.top[at]), float(run.top_share[at]), int(run.outlier_rank[at])
    layer = run.part_names[top] if top >= 0 and share > _MOST_OF_IT else ""
    text = f"; {percent(share)} of the largest in {layer}" if layer else ""
    norms = run.details_of(at).rank_norms
    if rank >= 0 and rank < len(norms) and norms[rank] == max(norms):
        text += f"; rank {rank} had by far the largest gradients, of norm {two_digits(norms[rank])}"
    return text


def _about_ranks(history: NormHistory) -> Iterator[str]:
    run, found = history.run, history.faulty_rank
    if found is None:
        return
    often = f"at {percent(found.share)} of the steps"
    when = (
        f"{often}, first at step {int(run.step[found.at]):,}"
        if math.isnan(found.share_before)
        else f"{often} from step {int(run.step[found.at]):,} on, and at "
        f"{percent(found.share_before)} before"
    )
    yield (
        f"the gradients of rank {found.rank} lie off those of the others {when}: look at its data "
        f"and its device"
    )


def _about_rate(run: RunLog) -> Iterator[str]:
    if not any(math.isfinite(limit) for limit in run.limits):
        return
    rate = float(run.clipped.mean())
    what = "value clipping acted" if run.clamps else "the run was clipped"
    if rate > _MOST_STEPS_CLIPPED:
        yield (
            f"{what} at {percent(rate)} of the steps: the threshold sets the length of most steps, "
            f"is a part of the learning rate, and less of a safety net"
        )
    elif rate == 0:
        limit = fixed_limit(run)
        yield (
            "the run was never clipped: its threshold"
            + (f" of {limit:g}" if limit is not None else "")
            + " was above every norm and did nothing"
        )


def _about_cosine(run: RunLog) -> Iterator[str]:
    bent = run.cosine[run.cosine < _BENT_COSINE]
    if len(bent):
        yield (
            f"value clipping bends the direction: at {percent(len(bent) / len(run))} of the steps "
            f"the cosine between raw and clipped gradient is below {_BENT_COSINE}, down to "
            f"{two_digits(float(bent.min()))}; a norm threshold keeps the direction"
        )
