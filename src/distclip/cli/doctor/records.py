"""Records that the doctor's files hand to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

# What one rank saw in a check; travels to rank 0 as JSON.
Observation = dict[str, Any]


class CannotRun(Exception):
    """The doctor cannot start or go on here; its text says what to do."""


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Where this process stands in the job, from the launcher's environment variables."""

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
    """What a check works with on this rank. `stage(step, sends)` tells the watch what comes next,
    and which collectives it sends."""

    rank: int
    size: int
    device: torch.device
    stage: Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table."""

    name: str
    result: Literal["pass", "fail", "measured", "not run"]
    seen: str
    do: str = ""  # only where it failed


class Check(Protocol):
    """`run` on every rank, `judge` on rank 0."""

    @property
    def name(self) -> str: ...

    @property
    def line(self) -> str:
        """One line for --list."""
        ...

    def lacks(self, size: int) -> str:
        """What a world of `size` ranks lacks for this check, or an empty text."""
        ...

    def run(self, bench: CheckContext) -> Observation: ...

    def judge(self, seen: Sequence[Observation]) -> Result:
        """`seen` by rank, of ranks that raised nothing."""
        ...


def spans(ranks: Iterable[int]) -> str:
    """`rank 2` or `ranks 0-3,6`."""
    ordered = sorted(ranks)
    parts: list[list[int]] = []
    for rank in ordered:
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
    return f"{'rank' if len(ordered) == 1 else 'ranks'} {text}"


def by_value(values: Sequence[Any]) -> dict[str, list[int]]:
    """value, as text → the ranks that have it; the commonest first."""
    found: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        found.setdefault(str(value), []).append(rank)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))
