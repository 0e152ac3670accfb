"""What the norms of a run did: spikes and their period, levels that it left, trends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from distclip.cli.run_log import RunLog

MEDIAN_WINDOW = 101  # steps of the running median, centred
_NARROWEST = 25  # the running median of a short run
_NEAREST = 5  # steps on either side, at least, of the median at the beginning
_BLOCK = 4096  # windows whose medians are worked out at once
_SPIKE_RATIO = 5.0  # times the running median, and
_SPIKE_SIGMAS = 6.0  # robust deviations of the log-norm from it
_EVENT_GAP = 10  # spikes closer than this are one event
_SIDE = 100  # steps before and after an event whose medians are compared
_JUMP_RATIO = 5.0  # median after over median before: another level
_BACK_RATIO = 2.0  # as near to the level before counts as back
_HUGE_RATIO = 1000.0  # times the running median: few models get over a step of that size
_FEWEST_BEFORE = 5  # steps before it, to compare with
_ENDED_STEPS = 10  # as many steps that are not finite, at the end of a run, are its end
_FEWEST_OFF = 5  # steps at which a rank lies off, before that is held against it
_CHANCE_SIGMAS = 4.0  # of the number that each rank has by chance
_MORE_OFTEN = 2.0  # times as often after a step as before: it began there
_NUM_SEGMENTS = 12
_SMALLEST_SEGMENT = 8  # steps
_LEG, _TREND_RATIO = math.log(1.5), 2.0  # a turn of the trend; what makes it worth a word
_SETTLED_SHARE = 0.17  # of the run: a trend that is over by then is its beginning
_FEWEST_PERIODS = 5


def running_median(norms: Any, width: int = MEDIAN_WINDOW) -> Any:
    """[steps]: median of the finite norms among the `width` nearest; at both ends those of the
    first and last `width`. Of an even number the lower one."""
    width = min(width, len(norms))
    windows = np.lib.stride_tricks.sliding_window_view(norms, width)
    inside = np.empty(len(windows))
    middle = (width - 1) // 2
    for start in range(0, len(windows), _BLOCK):
        block = windows[start : start + _BLOCK]
        if np.isfinite(norms[start : start + _BLOCK + width]).all():
            found = np.partition(block, middle, axis=1)[:, middle]
        else:
            ordered = np.sort(block, axis=1)  # NaN last
            num = np.isfinite(ordered).sum(1)
            found = ordered[np.arange(len(block)), np.maximum(num - 1, 0) // 2]
        inside[start : start + _BLOCK] = found
    before = width // 2
    after = len(norms) - len(inside) - before
    return np.concatenate([np.full(before, inside[0]), inside, np.full(after, inside[-1])])


class TrendLeg(NamedTuple):
    """A stretch over which the median norm rises or falls."""

    start: float
    end: float
    last_step: int  # by which it has come to `end`


@dataclass(frozen=True)
class SpikeEvent:
    """Spikes that follow one another, as positions."""

    first: int
    last: int
    worst: int


@dataclass(frozen=True)
class RunDivergence:
    """A level that a run did not come back from."""

    at: int  # position of its first step
    before: float  # median before; NaN: too few steps to tell
    after: float  # median of the rest; NaN: no norm after is finite
    ratio: float = math.nan  # of a step that nothing clipped and that the run did not get over

    @property
    def killed(self) -> bool:
        """By one step, after which the norms are far smaller."""
        return not math.isnan(self.ratio)


@dataclass(frozen=True)
class FaultyRank:
    """A rank whose own norm lies off that of the others more often than chance would have it."""

    rank: int
    at: int  # position of the first step of the stretch
    share: float  # of the steps from there on, at which it lies off
    share_before: float  # NaN where the stretch is the whole run


@dataclass(frozen=True)
class NormHistory:
    """All of it is worked out when it is first asked for."""

    run: RunLog

    @cached_property
    def median(self) -> Any:
        """[steps]: the running median."""
        return running_median(self.run.norm)

    @cached_property
    def ratio(self) -> Any:
        """[steps]: norm over running median; NaN where one of them is 0 or not finite. At the
        beginning, where the running median is that of later steps, over the median of as many
        steps before as after, if that is larger: norms that fall from the start are no spikes."""
        norm, median = self.run.norm, self.median.copy()
        for i in range(min(MEDIAN_WINDOW // 2, len(norm))):
            reach = max(i, _NEAREST)
            median[i] = np.fmax(median[i], _median(norm[max(0, i - reach) : i + reach + 1]))
        good = (norm > 0) & (median > 0)
        return np.divide(norm, median, out=np.full(len(norm), np.nan), where=good)

    @cached_property
    def sigma(self) -> float:
        """Robust deviation of the log-norm from its running median."""
        logs = np.abs(np.log(self.ratio[np.isfinite(self.ratio)]))
        return 1.4826 * float(np.median(logs)) if len(logs) else 0.0

    @cached_property
    def spike_ratio(self) -> float:
        """Times the running median above which a norm counts as a spike."""
        return max(_SPIKE_RATIO, math.exp(min(_SPIKE_SIGMAS * self.sigma, 50.0)))

    @cached_property
    def spikes(self) -> Any:
        """[n] positions."""
        return np.flatnonzero(self.ratio > self.spike_ratio)

    @cached_property
    def events(self) -> list[SpikeEvent]:
        """Spikes, those that follow one another together."""
        if not len(self.spikes):
            return []
        groups = np.split(self.spikes, np.flatnonzero(np.diff(self.spikes) > _EVENT_GAP) + 1)
        return [
            SpikeEvent(int(g[0]), int(g[-1]), int(g[np.argmax(self.run.norm[g])])) for g in groups
        ]

    def around(self, event: SpikeEvent) -> tuple[float, float]:
        """Median norm before and after it; NaN where there are no steps."""
        norm = self.run.norm
        before = norm[max(0, event.first - _SIDE) : event.first]
        after = norm[event.last + 1 : event.last + 1 + _SIDE]
        return _median(before), _median(after)

    @cached_property
    def period(self) -> int | None:
        """Steps between spikes that come back regularly; None where they do not."""
        steps = self.run.step[[event.first for event in self.events]].astype(float)
        if len(steps) < _FEWEST_PERIODS:
            return None
        gap = float(np.median(np.diff(steps)))
        if gap < 2 * _EVENT_GAP:
            return None
        # least squares over the numbers of the periods
        number = np.round((steps - steps[0]) / gap)
        period = gap
        for _ in range(3):
            if number[-1] == 0:
                return None
            period = float(np.polyfit(number, steps, 1)[0]) if len(set(number)) > 1 else gap
            number = np.round((steps - steps[0]) / period)
        phase = np.exp(2j * np.pi * steps / period)
        covered = len(set(number)) / (number[-1] + 1)
        regular = abs(phase.mean()) > 0.9 and covered > 0.6
        return round(period) if regular else None

    @cached_property
    def divergence(self) -> RunDivergence | None:
        """Where the run went to norms several times as large, or not finite, and stayed there; or
        where one huge step that nothing clipped threw it to far smaller ones."""
        run = self.run
        known = np.flatnonzero(run.finite)
        if not len(known):
            return None
        last = int(known[-1])
        ended = len(run) - 1 - last >= _ENDED_STEPS
        killed = next((one for one in map(self._killed_by, self.events) if one), None)
        if killed is not None:
            return killed
        jump = self._last_jump(last + 1)
        if jump is not None:
            return jump
        if ended:
            before = _median(run.norm[max(0, last + 1 - _SIDE) : last + 1])
            return RunDivergence(last + 1, before, math.nan)
        return None

    def _killed_by(self, event: SpikeEvent) -> RunDivergence | None:
        run, ratio = self.run, float(self.ratio[event.worst])
        if ratio < _HUGE_RATIO or run.clipped[event.worst] or run.skipped[event.worst]:
            return None
        before, after = self.around(event)
        if event.first < _FEWEST_BEFORE:
            before = math.nan
        elif not after < before / _JUMP_RATIO:
            return None
        return RunDivergence(event.worst, before, after, ratio)

    def _last_jump(self, end: int) -> RunDivergence | None:
        """The steepest rise of the running median, where the rest of the run stays up."""
        width = min(MEDIAN_WINDOW, end // 4 | 1)  # two levels of a short run must have room
        if width < _NARROWEST:
            return None
        half = width // 2
        whole = self.median if width == MEDIAN_WINDOW else running_median(self.run.norm, width)
        median = whole[:end]
        low, high = median[: -2 * half], median[2 * half :]  # around the positions from `half` on
        good = (low > 0) & (high > 0)
        rise = np.divide(high, low, out=np.ones(len(low)), where=good)
        for candidate in _peaks(rise, _JUMP_RATIO):
            position = candidate + half
            # the level that it left, of the steps before the windows meet
            before = float(median[candidate])
            rest = self.run.norm[position:end]
            if _median(rest) < _JUMP_RATIO * before or _median(rest[-_SIDE:]) < 3 * before:
                continue
            beyond = self.run.norm[candidate:end] > math.sqrt(_JUMP_RATIO) * before
            # the first step of which most that follow are beyond
            share = np.convolve(beyond, np.ones(20) / 20, "full")[19:]
            first = np.flatnonzero(beyond & (share[: len(beyond)] > 0.7))
            at = candidate + (int(first[0]) if len(first) else half)
            return RunDivergence(at, before, _median(rest))
        return None

    @cached_property
    def faulty_rank(self) -> FaultyRank | None:
        """With few ranks some lie off by chance at many a step, but no one of them far more often
        than the others."""
        run = self.run
        off = run.outlier_rank[run.outlier_rank >= 0]
        if not len(off):
            return None
        counts = np.bincount(off)
        rank, num = int(counts.argmax()), int(counts.max())
        known = [header.world_size for header in run.headers if header.world_size]
        by_chance = len(off) / max(known[-1] if known else 0, len(counts))
        if num < _FEWEST_OFF or num < by_chance + _CHANCE_SIGMAS * math.sqrt(by_chance):
            return None
        mine = run.outlier_rank == rank
        # where the sum of what exceeds its mean is lowest, the stretch with more of it begins
        at = int(np.cumsum(mine - mine.mean()).argmin()) + 1
        before, after = (
            float(part.mean()) if len(part) else 0.0 for part in (mine[:at], mine[at:])
        )
        if after < _MORE_OFTEN * before or at + _FEWEST_OFF > len(run):
            return FaultyRank(rank, int(mine.argmax()), float(mine.mean()), math.nan)
        return FaultyRank(rank, at + int(mine[at:].argmax()), after, before)

    @cached_property
    def sane(self) -> Any:
        """[steps] bool: finite, and before the run diverged."""
        mask = self.run.finite.copy()
        if self.divergence is not None:
            mask[self.divergence.at :] = False
        return mask

    @cached_property
    def legs(self) -> list[TrendLeg]:
        """The trend of the median norm as rises and falls of at least 1.5 times; empty where it
        changes less than 2-fold."""
        at = np.flatnonzero(self.sane & (self.run.norm > 0))
        size = len(at) // _NUM_SEGMENTS
        if size < _SMALLEST_SEGMENT:
            return []
        segments = np.array_split(at, _NUM_SEGMENTS)
        level = np.array([math.log(_median(self.run.norm[s])) for s in segments])
        ends = [int(self.run.step[s[-1]]) for s in segments]
        noise = 4 * 1.25 * self.sigma / math.sqrt(size)  # of a segment's median
        turns = _turning_points(level, max(_LEG, noise))
        legs = [
            TrendLeg(math.exp(level[a]), math.exp(level[b]), ends[b]) for a, b in pairwise(turns)
        ]
        moved = max((abs(math.log(leg.end / leg.start)) for leg in legs), default=0.0)
        return legs if moved >= math.log(_TREND_RATIO) else []

    @cached_property
    def settled_from(self) -> int | None:
        """The step from which on the norm keeps its level, where only the run's beginning differs;
        else None."""
        if len(self.legs) != 1:
            return None
        at = np.flatnonzero(self.sane & (self.run.norm > 0))
        segments = np.array_split(at, _NUM_SEGMENTS)
        num = round(_SETTLED_SHARE * _NUM_SEGMENTS)
        level = [math.log(_median(self.run.norm[s])) for s in segments[num:]]
        settled = max(level) - min(level) < _LEG
        return int(self.run.step[segments[num][0]]) if settled else None


def _median(norms: Any) -> float:
    """Of the finite ones; NaN of none."""
    known = norms[np.isfinite(norms)]
    return float(np.median(known)) if len(known) else math.nan


def _peaks(values: Any, least: float) -> list[int]:
    """Positions of the largest value of each stretch above `least`, the largest first."""
    above = np.flatnonzero(values >= least)
    if not len(above):
        return []
    groups = np.split(above, np.flatnonzero(np.diff(above) > 1) + 1)
    tops = [int(g[np.argmax(values[g])]) for g in groups]
    return sorted(tops, key=lambda i: -values[i])


def _turning_points(level: Any, least: float) -> list[int]:
    """Positions between which the level rises or falls by at least `least`, alternately; without
    the flat beginning."""
    turns: list[int] = []
    low = high = 0
    way = 0
    for i in range(1, len(level)):
        low = i if level[i] < level[low] else low
        high = i if level[i] > level[high] else high
        if way <= 0 and level[i] - level[low] >= least:
            turns.append(low)
            way, high = 1, i
        elif way >= 0 and level[high] - level[i] >= least:
            turns.append(high)
            way, low = -1, i
        elif way == 1:
            low = high
        elif way == -1:
            high = low
    if way:
        turns.append(high if way == 1 else low)
    return turns
