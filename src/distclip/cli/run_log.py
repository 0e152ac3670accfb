"""One log as columns over its steps."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from distclip.cli.log_header import RunHeader
from distclip.cli.log_lines import (
    ACTIONS,
    LogLine,
    decode_list,
    decode_norms,
    is_empty,
    printable_name,
)
from distclip.cli.part_shares import PartShares, ShareCollector

_RATE_WINDOW = 500  # steps of the rolling clip rate, as in ClipReport
_MOST_DETAILS = 20_000  # steps with culprits, notes or norms of ranks that are kept
_MOST_DETAIL_BYTES = 30_000_000  # as they stand in the file
_FLOATS = (
    "norm", "after", "coef", "threshold", "cosine", "clip_rate", "deviation", "rank_deviation",
)  # fmt: skip
_INTEGERS = ("nonfinite", "outlier_rank", "action")
_LARGEST_INT = (1 << 31) - 1


@dataclass(frozen=True)
class LoggedCulprit:
    """A gradient that was not finite."""

    parameter: str
    rank: int
    kind: str
    before: str | None  # the nearest finite parameters in the model's order
    after: str | None

    def __str__(self) -> str:
        finite = [name for name in (self.before, self.after) if name is not None]
        near = f" (finite: {' before, '.join(finite)} after)" if len(finite) == 2 else ""
        if len(finite) == 1:
            near = f" (finite: {finite[0]} {'after' if self.before is None else 'before'})"
        return f"{self.parameter} on rank {self.rank}: {self.kind}{near}"


@dataclass(frozen=True)
class RankNote:
    """What a rank noted."""

    rank: int
    step: int | None  # the note's own: that of the line, or one of the few before it
    note: Any  # any JSON
    cut: bool


@dataclass(frozen=True)
class StepDetails:
    """What only some steps have."""

    culprits: tuple[LoggedCulprit, ...] = ()
    notes: tuple[RankNote, ...] = ()
    rank_norms: tuple[float, ...] = ()  # NaN where not finite
    ended_in: str | None = None  # the class of an error

    @property
    def differs(self) -> bool:
        """Whether the step was not taken since copies of gradients were not equal."""
        return self.ended_in == "AgreementError"


_NO_DETAILS = StepDetails()


@dataclass(frozen=True)
class RunLog:
    """One log, in the order of the steps. Columns are NumPy's, [steps]; NaN marks what is not
    finite or not known."""

    name: str
    path: str
    headers: tuple[RunHeader, ...]  # one for each process that wrote to it; none in old logs
    step: Any  # int64
    norm: Any  # float64: before clipping
    after: Any  # float64: after it
    clipped: Any  # bool
    skipped: Any  # bool
    nonfinite: Any  # int32: gradients that were not finite
    coef: Any  # float64: the smallest of all groups
    threshold: Any  # float64: NaN where groups have different ones, or none
    cosine: Any  # float64: the smallest of all groups
    clip_rate: Any  # float64: share of the last ≤ 500 steps that were clipped
    deviation: Any  # float64: robust deviations of the log-norm
    outlier_rank: Any  # int32: -1 where there is none
    rank_deviation: Any  # float64
    action: Any  # int32: position in ACTIONS
    top: Any  # int32: the layer or group with the largest share, in part_names; -1 where not known
    top_share: Any  # float64: between 0 and 1; inf where its norm is not finite
    part_names: tuple[str, ...]
    groups: tuple[str, ...]
    limits: tuple[float, ...]  # the last threshold of each group; inf where none
    norm_type: float
    parts: tuple[PartShares, ...]
    details: dict[int, StepDetails]  # by step
    notes: tuple[str, ...] = field(default=())  # about lines that could not be used

    def __len__(self) -> int:
        return len(self.step)

    @cached_property
    def finite(self) -> Any:
        """[steps] bool."""
        return np.isfinite(self.norm)

    @cached_property
    def clamps(self) -> bool:
        """Whether elements were clamped (`FixedValue`): the threshold then bounds each element, not
        the norm."""
        acted = (
            self.finite & ~self.skipped & (self.clipped | (self.norm > 1.000001 * self.threshold))
        )
        return bool(acted.any()) and float((self.coef[acted] == 1).mean()) > 0.5

    def details_of(self, at: int) -> StepDetails:
        """Of the step at this position."""
        return self.details.get(int(self.step[at]), _NO_DETAILS)


class StepColumns:
    """Takes lines one by one. A repeated step replaces the earlier one: a run was resumed into the
    same file."""

    def __init__(self) -> None:
        self.steps = array("q")
        self._flags = array("B")
        self._floats = {name: array("d") for name in _FLOATS}
        self._integers = {name: array("i") for name in _INTEGERS}
        self._parts = ShareCollector("group"), ShareCollector("layer")
        self._details: dict[int, StepDetails] = {}  # by row
        self._num_undetailed, self._detail_bytes = 0, 0
        self._norm_type = 2.0
        self._limits: list[float | None] = []
        self._raw_groups = b""

    def adder(self) -> Callable[[LogLine], None]:
        """What takes the next line. It is called for each of a million: names are looked up once,
        here."""
        columns = [self._floats[name].append for name in _FLOATS]
        put_norm, put_after, put_coef, put_threshold = columns[:4]
        put_cosine, put_rate, put_deviation, put_rank_deviation = columns[4:]
        put_nonfinite, put_rank, put_action = (self._integers[name].append for name in _INTEGERS)
        put_step, put_flags = self.steps.append, self._flags.append
        groups, layers = self._parts
        nan = math.nan

        def add(line: LogLine) -> None:
            norm = line.total_norm
            put_step(line.step)
            put_norm(nan if norm is None else norm)
            put_after(nan if line.norm_after is None else line.norm_after)
            put_flags(line.clipped + 2 * line.skipped)
            put_coef(_smallest(line.coefs))
            limits = line.threshold
            if limits:
                self._limits = limits
            put_threshold(_common_limit(limits))
            put_cosine(_smallest(line.cosine))
            put_rate(nan if line.clip_rate is None else line.clip_rate)
            put_deviation(nan if line.deviation is None else line.deviation)
            put_rank_deviation(nan if line.rank_deviation is None else line.rank_deviation)
            put_nonfinite(min(max(line.nonfinite, 0), _LARGEST_INT))
            put_rank(-1 if line.outlier_rank is None else min(line.outlier_rank, _LARGEST_INT))
            put_action(0 if line.action in (None, "none") else _action_number(line.action))
            row = len(self.steps) - 1
            groups.add(row, line)
            layers.add(row, line)
            self._norm_type = math.inf if line.norm_type is None else line.norm_type
            if bytes(line.groups) not in (b"", self._raw_groups):
                self._raw_groups = bytes(line.groups)
            lists = is_empty(line.culprits) and is_empty(line.notes) and is_empty(line.rank_norms)
            if not lists or line.ended_in is not None:
                self._add_details(row, line)

        return add

    def _add_details(self, row: int, line: LogLine) -> None:
        # with RankNorms every line has norms of ranks; those of ordinary steps are not shown
        ordinary = line.outlier_rank is None and not line.skipped
        details = StepDetails(
            tuple(map(_culprit, filter(_is_dict, decode_list(line.culprits)))),
            tuple(map(_note, filter(_is_dict, decode_list(line.notes)))),
            () if ordinary or is_empty(line.rank_norms) else tuple(decode_norms(line.rank_norms)),
            line.ended_in,
        )
        if details == _NO_DETAILS:
            return
        self._detail_bytes += sum(map(len, map(bytes, (line.culprits, line.notes))))
        if len(self._details) < _MOST_DETAILS and self._detail_bytes < _MOST_DETAIL_BYTES:
            self._details[row] = details
        else:
            self._num_undetailed += 1

    def build_log(self, path: Path, headers: Sequence[RunHeader]) -> RunLog:
        """Its notes are about steps: repeated ones, and what was too much to keep."""
        step = np.frombuffer(self.steps, np.int64)
        order, num_repeated = _last_of_each(step)
        floats = {name: _finite(values)[order] for name, values in self._floats.items()}
        integers = {
            name: np.frombuffer(values, np.int32)[order] for name, values in self._integers.items()
        }
        flags = np.frombuffer(self._flags, np.uint8)[order]
        top, top_share = np.full(len(step), -1, np.int32), np.full(len(step), np.nan)
        parts = [part for part in (one.finish() for one in self._parts) if part is not None]
        names: list[str] = []
        for one in self._parts:  # layers come last: they are finer where both are there
            one.put_tops(top, top_share, len(names))
            names += one.all_names
        clipped = flags & 1 > 0
        rate = floats["clip_rate"]
        if np.isnan(rate).any():
            floats["clip_rate"] = np.where(np.isnan(rate), _rolling_rate(clipped), rate)
        rows = set(order.tolist()) if num_repeated and self._details else None
        details = {
            int(step[row]): found
            for row, found in self._details.items()
            if rows is None or row in rows
        }
        return RunLog(
            name=path.stem,
            path=str(path),
            headers=tuple(headers),
            step=step[order],
            clipped=clipped,
            skipped=flags & 2 > 0,
            top=top[order],
            top_share=top_share[order],
            part_names=tuple(names),
            groups=tuple(
                printable_name(str(name)) for name in decode_list(msgspec.Raw(self._raw_groups))
            ),
            limits=tuple(
                math.inf if limit is None or not math.isfinite(limit) else limit
                for limit in self._limits
            ),
            norm_type=self._norm_type,
            parts=tuple(parts),
            details=details,
            notes=tuple(self._notes(path, step, num_repeated)),
            **floats,
            **integers,
        )

    def _notes(self, path: Path, step: Any, num_repeated: int) -> Iterable[str]:
        if num_repeated:
            count = "1 step is" if num_repeated == 1 else f"{num_repeated} steps are"
            yield (
                f"{path}: {count} there more than once (a run that was resumed?); the later line "
                f"counts"
            )
        if step[-1] < (last := int(step.max())):
            yield (
                f"{path}: its last line is step {int(step[-1])}, yet step {last} stands before "
                f"it; were two runs written to one file?"
            )
        if self._num_undetailed:
            yield (
                f"{path}: culprits and notes of the first {len(self._details)} steps that have "
                f"some are shown, those of {self._num_undetailed} more are not"
            )


def _smallest(values: list[float | None]) -> float:
    """NaN of none."""
    if len(values) == 1:
        return math.nan if values[0] is None else values[0]
    known = [value for value in values if value is not None]
    return min(known) if known else math.nan


def _common_limit(limits: list[float | None]) -> float:
    """The finite threshold, where there is one only."""
    if len(limits) == 1:
        return math.nan if limits[0] is None else limits[0]
    finite = {limit for limit in limits if limit is not None}
    return finite.pop() if len(finite) == 1 else math.nan


def _action_number(action: str | None) -> int:
    return ACTIONS.index(action) if action in ACTIONS else 0


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _culprit(said: dict[str, Any]) -> LoggedCulprit:
    def name(key: str) -> str | None:
        return None if said.get(key) is None else printable_name(str(said[key]))

    return LoggedCulprit(
        parameter=name("parameter") or "?",
        rank=_whole(said.get("rank")),
        kind=name("kind") or "not finite",
        before=name("before"),
        after=name("after"),
    )


def _note(said: dict[str, Any]) -> RankNote:
    step = said.get("step")
    return RankNote(
        _whole(said.get("rank")),
        step if isinstance(step, int) else None,
        said.get("note"),
        bool(said.get("cut", False)),
    )


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else -1


def _finite(values: array[float]) -> Any:
    """As a column: inf becomes NaN."""
    column = np.frombuffer(values, np.float64)
    return np.where(np.isinf(column), np.nan, column) if np.isinf(column).any() else column


def _last_of_each(step: Any) -> tuple[Any, int]:
    """Rows in the order of the steps, of equal steps the last, and how many are replaced."""
    if len(step) < 2 or bool((np.diff(step) > 0).all()):
        return slice(None), 0
    order = np.argsort(step, kind="stable")
    last = np.append(np.diff(step[order]) > 0, True)
    return order[last], int(len(step) - last.sum())


def _rolling_rate(clipped: Any) -> Any:
    """[steps]: share of the last 500 steps (or fewer) that were clipped, for logs without
    clip_rate."""
    total = np.concatenate([[0], np.cumsum(clipped)])
    end = np.arange(1, len(total))
    start = np.maximum(0, end - _RATE_WINDOW)
    return (total[end] - total[start]) / (end - start)
