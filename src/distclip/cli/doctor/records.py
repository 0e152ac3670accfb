"""Records that the doctor's files exchange, and how ranks are named in its texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from distclip.cli.number_ranges import format_ranges, number_ranges

# What one rank saw in a check; travels to rank 0 as JSON.
Observation = dict[str, Any]


class CannotRun(Exception):
    """The doctor cannot start or continue here; its text names the remedy."""


@dataclass(frozen=True, slots=True)
class RankInfo:
    """This process's place in the job, from the launcher's environment variables."""

    rank: int
    size: int
    local_rank: int
    host: str
    timeout_s: float  # of every collective

    @property
    def grace_s(self) -> float:
        """After a time-out: for the collective's own error, and for the other ranks to come out of
        it; 4 s of the default 40."""
        return min(4.0, self.timeout_s / 4)


@dataclass(frozen=True, slots=True)
class CheckContext:
    """What a check works with on this rank. `begin_stage(step, sends)` tells the watchdog what
    comes next, and which collectives it sends."""

    rank: int
    size: int
    device: torch.device
    begin_stage: Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of the table."""

    name: str
    result: Literal["pass", "fail", "measured", "not run"]
    seen: str
    remedy: str = ""  # only where it failed


class DoctorCheck(Protocol):
    """`run` on every rank, `judge` on rank 0."""

    @property
    def name(self) -> str: ...

    @property
    def line(self) -> str:
        """One line for --list."""
        ...

    def unmet_requirement(self, size: int) -> str:
        """What this check needs and a world of `size` ranks does not have; empty if nothing."""
        ...

    def run(self, context: CheckContext) -> Observation: ...

    def judge(self, observations: Sequence[Observation]) -> CheckResult:
        """`observations` by rank, of ranks that raised nothing."""
        ...


def name_ranks(ranks: Iterable[int]) -> str:
    """`rank 2` or `ranks 0-3,6`."""
    ranges = number_ranges(ranks)
    one = len(ranges) == 1 and ranges[0][0] == ranges[0][1]
    return f"{'rank' if one else 'ranks'} {format_ranges(ranges)}"


def ranks_by_value(values: Sequence[Any]) -> dict[str, list[int]]:
    """Each value, as text, with the ranks that have it; the most frequent first."""
    found: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        found.setdefault(str(value), []).append(rank)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))
