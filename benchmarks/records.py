"""What a benchmark hands on: spreads of samples, and one row for each comparison."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of `n` samples."""

    median: float
    q1: float
    q3: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q1, q3, len(samples))


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison or one figure.

    A comparison's `value` is the paired ratio peer / ours (above 1: distclip is faster) and has the
    unit "x"; a figure has no peer.
    """

    case: str
    what: str
    value: Spread
    unit: str
    ours: str
    peer: str = ""
    peer_s: Spread | None = None
    ours_s: Spread | None = None
    floor: float | None = None
    at_least: bool = True  # False: the floor is a ceiling
    # the floor is one that was set for this case, not the general "no slower than the peer"
    issue: bool = False
    kernels: str = "torch"
    threads: int = 1
    ranks: int = 1
    main: bool = False  # shown in the plot
    note: str = ""

    @property
    def verdict(self) -> str:
        """`level`: no slower than the peer was asked for, and 1 lies between the quartiles."""
        if self.floor is None:
            return ""
        good = self.value.median >= self.floor if self.at_least else self.value.median <= self.floor
        if good:
            return "reached"
        return (
            "level"
            if not self.issue and self.unit == "x" and self.value.q3 >= self.floor
            else "not reached"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Row:
        fields = {k: v for k, v in record.items() if k != "verdict"}
        for name in ("value", "peer_s", "ours_s"):
            fields[name] = None if fields[name] is None else Spread(**fields[name])
        return cls(**fields)
