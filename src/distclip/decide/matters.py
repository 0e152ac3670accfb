"""Which steps are worth more than their numbers: what is known of them alone is kept (norms of the
watched layers), or asked of all ranks (notes).

A step matters if it is skipped, if its norm is an outlier, or if it is among the ten largest so
far. This is worked out on the host from reduced norms, which are equal on every rank, and begins
anew with each set-up, a collective: so ranks never differ in it. A checkpoint does not hold it.
"""

from __future__ import annotations

import math
from collections import deque
from heapq import heappush, heapreplace
from typing import Literal, NamedTuple, TypeAlias

Matters: TypeAlias = Literal["skipped", "outlier", "largest"]

WINDOW = 128  # finite steps that were taken, with which one is compared
LEAST = 16  # of them, before any step is an outlier or among the largest
# Median and deviation are worked out anew each time an eighth of the window is new: doing it at
# each step would cost as much as all the rest of a small clip.
REFRESHES = 8
OUTLIER = 4.0  # robust deviations
# The least robust deviation of log norms: what lies within a tenth of the median is no outlier,
# however constant the norm was.
LEAST_SCALE = 0.1 / OUTLIER
_MAD_TO_SIGMA = 1.4826  # of a normal distribution
LARGEST = 10
# Of the last WINDOW steps at most so many count as among the largest alone: of a norm that grows
# and grows each one is.
MOST_LARGEST = 32


class Judgement(NamedTuple):
    """Of one step: why it matters, the first that holds, or None; and how far its log norm lies
    from the median of the window before it, in robust deviations (None where that is not known)."""

    matters: Matters | None
    deviation: float | None


class NormWindow:
    """The running window of log norms, and the ten largest norms."""

    def __init__(self) -> None:
        self._logs: deque[float] = deque(maxlen=WINDOW)
        self._until_refresh = LEAST
        self._median = self._scale = 0.0  # scale 0: not known yet
        self._largest: list[float] = []  # a heap, the smallest first
        self._num_judged = 0
        self._marked: deque[int] = deque(maxlen=MOST_LARGEST)  # steps that were "largest" alone

    def judge(self, norm: float, skipped: bool) -> Judgement:
        """Judge a step by those before it, and remember it.

        Args:
            norm: before clipping; NaN where some gradient is not finite. A norm of 0, of no
                gradients at all, has no logarithm and is not judged.
            skipped: the step is not taken: its norm does not enter the window.
        """
        self._num_judged += 1
        if not 0 < norm < math.inf:
            matters = "skipped" if skipped else None if norm == 0 else "outlier"
            return Judgement(matters, None)
        log, deviation = math.log(norm), None
        if self._scale:
            deviation = (log - self._median) / self._scale
        is_largest = self._enters_largest(norm)
        if not skipped:
            self._remember(log)
        if skipped:
            return Judgement("skipped", deviation)
        if deviation is None:
            return Judgement(None, None)
        if not -OUTLIER <= deviation <= OUTLIER:
            return Judgement("outlier", deviation)
        return Judgement("largest" if is_largest and self._mark() else None, deviation)

    def _enters_largest(self, norm: float) -> bool:
        if len(self._largest) < LARGEST:
            heappush(self._largest, norm)
            return True
        if norm <= self._largest[0]:
            return False
        heapreplace(self._largest, norm)
        return True

    def _mark(self) -> bool:
        """Whether a step may still matter for being among the largest."""
        marked, now = self._marked, self._num_judged
        if len(marked) == MOST_LARGEST and now - marked[0] < WINDOW:
            return False
        marked.append(now)
        return True

    def _remember(self, log: float) -> None:
        self._logs.append(log)
        self._until_refresh -= 1
        if not self._until_refresh:
            self._until_refresh = len(self._logs) // REFRESHES
            self._median = _middle(sorted(self._logs))
            apart = _middle(sorted([abs(each - self._median) for each in self._logs]))
            self._scale = max(_MAD_TO_SIGMA * apart, LEAST_SCALE)


def _middle(ordered: list[float]) -> float:
    """The median of sorted numbers."""
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
