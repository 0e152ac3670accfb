"""Reads the lines that JSONLSink wrote. What cannot be read is described in plain words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distclip.cli.number_ranges import format_ranges, number_ranges

# numbers of group vectors kept in memory; beyond that only those of each 2nd, 4th, … step
_MOST_NUMBERS = 4_000_000
_RATE_WINDOW = 500  # steps of the rolling clip rate, as in ClipReport


class RunError(Exception):
    """A log of which nothing can be read. Its text names the remedy."""


@dataclass(frozen=True)
class SkippedStep:
    """A skipped step."""

    step: int
    nonfinite: int  # 0: the policy skipped it
    norm: float  # NaN where it is not finite
    culprits: tuple[str, ...]


@dataclass(frozen=True)
class PartNorms:
    """Norms of groups or layers at those steps at which they were written."""

    names: tuple[str, ...]
    steps: Tensor  # [n] int64
    norms: Tensor  # [n, names] float64
    kind: str  # "group" or "layer"


@dataclass(frozen=True)
class RunLog:
    """One log, in the order of the steps. Columns are [steps]; NaN marks what is not finite or not
    known."""

    name: str
    path: str
    step: Tensor  # int64
    norm: Tensor  # float64: before clipping
    after: Tensor  # float64: after it
    clipped: Tensor  # bool
    skipped: Tensor  # bool
    coef: Tensor  # float64: the smallest of all groups
    threshold: Tensor  # float64: NaN where groups have different ones, or none
    cosine: Tensor  # float64: the smallest of all groups
    clip_rate: Tensor  # float64: share of the last ≤ 500 steps that were clipped
    groups: tuple[str, ...]
    limits: tuple[float, ...]  # the last threshold of each group; inf where none
    norm_type: float
    parts: tuple[PartNorms, ...]
    skips: tuple[SkippedStep, ...]
    notes: tuple[str, ...] = field(default=())  # about lines that could not be used

    @property
    def finite(self) -> Tensor:
        """[steps] bool."""
        return self.norm.isfinite()

    @property
    def clamps(self) -> bool:
        """Whether elements were clamped (`FixedValue`): the threshold then bounds each element, not
        the norm."""
        acted = (
            self.finite & ~self.skipped & (self.clipped | (self.norm > 1.000001 * self.threshold))
        )
        return bool(acted.any()) and bool((self.coef[acted] == 1).double().mean() > 0.5)


def read_runs(
    paths: Sequence[str], check: Callable[[RunLog], None] = lambda run: None
) -> tuple[list[RunLog], list[str]]:
    """Read each file, and all `*.jsonl` of a folder. Names are unique.

    Returns:
        The logs, and a line for each file of a folder that could not be used, with the reason.

    Args:
        check: raises RunError for a log that the caller cannot use.

    Raises:
        RunError: a file that was named itself cannot be used, or a folder holds none that can.
    """
    named = {Path(path) for path in paths}
    files = log_files(paths)
    stems = [file.stem for file in files]
    runs: list[RunLog] = []
    left_out: list[str] = []
    for file in files:
        try:
            # a file that was named itself may be a pipe
            if file not in named and file.exists() and not file.is_file():
                raise RunError(f"{file} is no file")
            run = read_log(
                file,
                printable_name(
                    file.stem if stems.count(file.stem) == 1 else str(file.with_suffix(""))
                ),
            )
            check(run)
            runs.append(run)
        except RunError as error:
            if file in named:
                raise
            left_out.append(f"left out: {error}")
    if not runs:
        raise RunError("none of the folder's files can be used\n" + "\n".join(left_out))
    return runs, left_out


def log_files(paths: Sequence[str]) -> list[Path]:
    """Each file, and all `*.jsonl` of a folder, once.

    Raises:
        RunError: a folder has none.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not inside:
            raise RunError(
                f"{path} is a folder without *.jsonl files; pass the file that JSONLSink wrote"
            )
        files += inside
    return list(dict.fromkeys(files))


def printable_name(name: str) -> str:
    """A name from a log or a file system as it can be printed: one line, without control characters
    and lone surrogates."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in name)


def read_log(path: Path, name: str) -> RunLog:
    """The readable part of a log; `notes` describe the rest.

    Raises:
        RunError: there is no such file, it cannot be read, is empty, or holds no line of a clipper.
    """
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            found = _LogReader()
            for number, line in enumerate(file, 1):
                found.add_line(number, line)
    except OSError as error:
        raise RunError(
            f"{path}: {error.strerror or error}; pass the file that JSONLSink wrote"
        ) from error
    if not found.rows:
        what = (
            f"none of its {len(found.bad_lines)} lines is a report of distclip"
            if found.bad_lines
            else "it is empty"
        )
        raise RunError(
            f"{path}: {what}; write one with GradClipper(..., "
            'sinks=[distclip.JSONLSink("run.jsonl")])'
        )
    return found.build_log(path, name)


class _LogReader:
    """Reads a file line by line. A repeated step replaces the earlier one: a run was resumed into
    the same file."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[float, ...]] = {}
        self.bad_lines: list[int] = []
        self._last_line_cut = False  # the last line is no report and has no end
        self.skips: dict[int, SkippedStep] = {}
        self._vectors: dict[str, dict[int, Tensor]] = {"group": {}, "layer": {}}
        self._names: dict[str, tuple[str, ...]] = {"group": (), "layer": ()}
        self._stride, self._num_kept, self._num_repeated, self._last_step, self._norm_type = (
            1,
            0,
            0,
            0,
            2.0,
        )
        self._limits: tuple[float, ...] = ()

    def add_line(self, number: int, line: str) -> None:
        if not line.strip():
            return
        try:
            record = json.loads(line)
            if "distclip_log" in record:  # a header
                return
            step, row = _step_number(record["step"]), _number_row(record)
            skip = _skipped_step(step, record)
            vectors = {
                "group": _named_norms(record, "groups", "group_norms"),
                "layer": _named_norms(record, "layers", "layer_norms"),
            }
            limits = tuple(_finite_number(t, math.inf) for t in record.get("threshold", ()))
            norm_type = _finite_number(record.get("norm_type", 2.0), math.inf)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            self.bad_lines.append(number)
            self._last_line_cut = not line.endswith("\n")
            return
        self._num_repeated += step in self.rows
        self._limits = limits or self._limits
        self.rows[step], self._last_step, self._norm_type = row, step, norm_type
        self.skips.pop(step, None)
        if skip is not None:
            self.skips[step] = skip
        for kind, vector in vectors.items():
            self._vectors[kind].pop(step, None)
            if vector is not None and step % self._stride == 0:
                self._keep_vector(kind, step, *vector)

    def _keep_vector(self, kind: str, step: int, names: tuple[str, ...], norms: Tensor) -> None:
        if names != self._names[kind]:  # the clipper was rebuilt: keep the latest groups
            self._names[kind], self._vectors[kind] = names, {}
        self._vectors[kind][step] = norms
        self._num_kept += len(names)
        if self._num_kept > _MOST_NUMBERS:
            self._stride *= 2
            for which, vectors in self._vectors.items():
                self._vectors[which] = {s: v for s, v in vectors.items() if s % self._stride == 0}
            self._num_kept = sum(
                len(v) for vectors in self._vectors.values() for v in vectors.values()
            )

    def build_log(self, path: Path, name: str) -> RunLog:
        steps = sorted(self.rows)
        table = torch.tensor([self.rows[step] for step in steps], dtype=torch.float64)
        norm, after, clipped, skipped, coef, threshold, cosine, rate = table.unbind(1)
        rate = torch.where(rate.isnan(), _rolling_rate(clipped), rate)
        parts: list[PartNorms] = []
        for kind, vectors in self._vectors.items():
            if len(self._names[kind]) > 1 and vectors:
                known = sorted(vectors)
                parts.append(
                    PartNorms(
                        self._names[kind],
                        torch.tensor(known),
                        torch.stack([vectors[s] for s in known]).double(),
                        kind,
                    )
                )
        return RunLog(
            name=name,
            path=str(path),
            step=torch.tensor(steps),
            norm=norm,
            after=after,
            clipped=clipped > 0,
            skipped=skipped > 0,
            coef=coef,
            threshold=threshold,
            cosine=cosine,
            clip_rate=rate,
            groups=self._names["group"],
            limits=self._limits,
            norm_type=self._norm_type,
            parts=tuple(parts),
            skips=tuple(self.skips[s] for s in sorted(self.skips)),
            notes=tuple(self._unused_lines(path)),
        )

    def _unused_lines(self, path: Path) -> Iterable[str]:
        bad = self.bad_lines[:-1] if self._last_line_cut else self.bad_lines
        if bad:
            count = "1 line is" if len(bad) == 1 else f"{len(bad)} lines are"
            yield f"{path}: {count} no report of distclip and left out: {_line_ranges(bad)}"
        if self._last_line_cut:
            yield (
                f"{path}: line {self.bad_lines[-1]}, the last, is cut short and left out: the run "
                f"goes on, or was ended while it wrote"
            )
        if self._num_repeated:
            count = "1 step is" if self._num_repeated == 1 else f"{self._num_repeated} steps are"
            yield (
                f"{path}: {count} there more than once (a run that was resumed?); the later line "
                f"counts"
            )
        if self._last_step < max(self.rows):
            last = max(self.rows)
            yield (
                f"{path}: its last line is step {self._last_step}, yet step {last} stands before "
                f"it; were two runs written to one file?"
            )


def _number_row(record: Mapping[str, Any]) -> tuple[float, ...]:
    """One line's norm before and after clipping, clipped, skipped, coefficient, threshold, cosine
    and clip rate."""
    coefs = [_finite_number(c) for c in record.get("coefs", ())]
    cosines = [_finite_number(c) for c in record.get("cosine", ())]
    thresholds = {_finite_number(t, math.inf) for t in record.get("threshold", ())} - {math.inf}
    return (
        _finite_number(record["total_norm"]),
        _finite_number(record.get("norm_after")),
        float(bool(record.get("clipped", False))),
        float(bool(record.get("skipped", False))),
        min(coefs) if coefs else math.nan,
        thresholds.pop() if len(thresholds) == 1 else math.nan,
        min(cosines) if cosines else math.nan,
        _finite_number(record.get("clip_rate")),
    )


def _step_number(value: Any) -> int:
    step = int(value)
    if not 0 <= step < 1 << 53:
        raise ValueError("no step")
    return step


def _finite_number(value: Any, absent: float = math.nan) -> float:
    """A finite float; `absent` for None (JSONLSink writes inf and NaN as null) and for what is not
    finite."""
    if value is None:
        return absent
    number = float(value)
    return number if math.isfinite(number) else absent


def _skipped_step(step: int, record: Mapping[str, Any]) -> SkippedStep | None:
    if not record.get("skipped"):
        return None
    who = tuple(
        f"{printable_name(str(c['parameter']))} on rank {c['rank']}: {c['kind']}"
        for c in record.get("culprits", ())
    )
    return SkippedStep(
        step, int(record.get("nonfinite", 0)), _finite_number(record["total_norm"]), who
    )


def _named_norms(
    record: Mapping[str, Any], names: str, norms: str
) -> tuple[tuple[str, ...], Tensor] | None:
    """Names and norms, where the line has them."""
    values = [_finite_number(n) for n in record.get(norms) or ()]
    labels = tuple(printable_name(str(name)) for name in record.get(names) or ())
    return (
        (labels, torch.tensor(values, dtype=torch.float32))
        if values and len(values) == len(labels)
        else None
    )


def _rolling_rate(clipped: Tensor) -> Tensor:
    """[steps]: share of the last 500 steps (or fewer) that were clipped, for logs without
    clip_rate."""
    total = clipped.cumsum(0)
    before = torch.cat(
        [total.new_zeros(min(_RATE_WINDOW, len(total))), total[: max(0, len(total) - _RATE_WINDOW)]]
    )
    return (total - before) / torch.arange(1, len(total) + 1).clamp(max=_RATE_WINDOW)


def _line_ranges(numbers: Sequence[int], most: int = 8) -> str:
    """1, 2, 3, 7 → "lines 1-3, 7"."""
    ranges = number_ranges(numbers)
    shown = format_ranges(ranges[:most], ", ")
    more = sum(b - a + 1 for a, b in ranges[most:])
    return f"line{'s' if len(numbers) > 1 else ''} {shown}" + (f" and {more} more" if more else "")
