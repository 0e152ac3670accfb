"""Which steps are worth more than their numbers: what is known of them alone is kept (norms of the
watched layers), or asked of all ranks (notes).

A step matters if it is skipped, if its norm is an outlier, if a rank begins to lie off the others
(RankNorms), or if it is among the ten largest so far. This is worked out on the host from reduced
norms, which are equal on every rank, and begins anew with each set-up, a collective: so ranks never
differ in it. A checkpoint does not hold it.
"""

from __future__ import annotations

import math
from collections import deque
from heapq import heapreplace
from typing import Literal, TypeAlias

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
# Of the last WINDOW steps at most so many count as among the largest, or for a rank, alone: of a
# norm that grows and grows each one is, and of few ranks some lie off by chance.
MOST_MARKED = 32


class NormWindow:
    """The running window of log norms, and the ten largest norms."""

    __slots__ = (
        "_largest",
        "_logs",
        "_marked",
        "_median",
        "_num_judged",
        "_outlier_rank",
        "_scale",
        "_until_refresh",
    )

    def __init__(self) -> None:
        self._logs: deque[float] = deque(maxlen=WINDOW)
        self._until_refresh = LEAST
        self._median, self._scale = 0.0, 0.0  # scale 0: not known yet
        self._largest = [0.0] * LARGEST  # a heap, the smallest first
        self._num_judged = 0
        self._marked: deque[int] = deque(maxlen=MOST_MARKED)  # those of `_mark`
        self._outlier_rank: int | None = None  # of the last step

    def judge(
        self, norm: float, skipped: bool, outlier_rank: int | None = None
    ) -> tuple[Matters | None, float | None]:
        """Judge a step by those before it, and remember it.

        Returns:
            Why it matters, the first that holds; and how far its log norm lies from the median of
            the window before it, in robust deviations. None where it does not, and where that is
            not known.

        Args:
            norm: before clipping; NaN where some gradient is not finite. A norm of 0, of no
                gradients at all, has no logarithm and is not judged.
            skipped: the step is not taken: its norm does not enter the window.
            outlier_rank: whose own norm lies off the others. A rank that stays off is told once.
        """
        is_new_rank = outlier_rank not in (None, self._outlier_rank)
        self._outlier_rank = outlier_rank
        self._num_judged += 1
        if not 0 < norm < math.inf:
            return "skipped" if skipped else None if norm == 0 else "outlier", None
        log, deviation = math.log(norm), None
        if self._scale:
            deviation = (log - self._median) / self._scale
        is_largest = norm > self._largest[0]
        if is_largest:
            heapreplace(self._largest, norm)
        if skipped:
            return "skipped", deviation
        self._logs.append(log)
        self._until_refresh -= 1
        if not self._until_refresh:
            self._refresh()
        if deviation is None:
            return "outlier" if is_new_rank and self._mark() else None, None
        if not -OUTLIER <= deviation <= OUTLIER:
            return "outlier", deviation
        if is_new_rank and self._mark():
            return "outlier", deviation
        return "largest" if is_largest and self._mark() else None, deviation

    def _mark(self) -> bool:
        """Whether a step may still matter for that alone."""
        marked, now = self._marked, self._num_judged
        if len(marked) == MOST_MARKED and now - marked[0] < WINDOW:
            return False
        marked.append(now)
        return True

    def _refresh(self) -> None:
        self._until_refresh = len(self._logs) // REFRESHES
        median = self._median = _middle(sorted(self._logs))
        apart = _middle(sorted([abs(log - median) for log in self._logs]))
        self._scale = max(_MAD_TO_SIGMA * apart, LEAST_SCALE)


def _middle(ordered: list[float]) -> float:
    """The median of sorted numbers."""
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
