"""Reading the lines that JSONLSink wrote: what can be read of a log, and in plain words what
cannot."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# of group vectors kept in memory; beyond that only each 2nd, 4th, … step's
_MOST_NUMBERS = 4_000_000
_WINDOW = 500  # steps of the rolling clip rate, as in ClipReport


class RunError(Exception):
    """A log of which nothing can be read. The text says what to do."""


@dataclass(frozen=True)
class Skip:
    """A step that was not taken."""

    step: int
    nonfinite: int  # 0: the policy left it out
    norm: float  # NaN where it is not finite
    culprits: tuple[str, ...]


@dataclass(frozen=True)
class Parts:
    """Norms of groups or layers at those steps at which they were written."""

    names: tuple[str, ...]
    steps: Tensor  # [n] int64
    norms: Tensor  # [n, names] float64
    kind: str  # "group" or "layer"


@dataclass(frozen=True)
class Run:
    """One log, a line a step, in the order of the steps. Columns are [steps]; NaN stands for what
    is not finite or not known."""

    name: str
    path: str
    step: Tensor  # int64
    norm: Tensor  # float64: before clipping
    after: Tensor  # float64: after it
    clipped: Tensor  # bool
    skipped: Tensor  # bool
    coef: Tensor  # float64: the smallest of all groups
    threshold: Tensor  # float64: where all groups that are clipped have the same
    cosine: Tensor  # float64: the smallest of all groups
    clip_rate: Tensor  # float64: share of the last ≤ 500 steps that were clipped
    groups: tuple[str, ...]
    limits: tuple[float, ...]  # the last threshold of each group; inf where none
    norm_type: float
    parts: tuple[Parts, ...]
    skips: tuple[Skip, ...]
    notes: tuple[str, ...] = field(default=())  # what of the file could not be used

    @property
    def finite(self) -> Tensor:
        """[steps] bool."""
        return self.norm.isfinite()

    @property
    def clamps(self) -> bool:
        """Elements were clamped (`FixedValue`): the threshold is a bound of each element, not of
        the norm."""
        acted = (
            self.finite & ~self.skipped & (self.clipped | (self.norm > 1.000001 * self.threshold))
        )
        return bool(acted.any()) and bool((self.coef[acted] == 1).double().mean() > 0.5)


def read_runs(
    paths: Sequence[str], check: Callable[[Run], None] = lambda run: None
) -> tuple[list[Run], list[str]]:
    """Each file, and all `*.jsonl` of a folder, with names that tell them apart; and what of a
    folder was left out, and why.

    Args:
        check: raises RunError for a log that is of no use to the caller.

    Raises:
        RunError: a file that was named itself cannot be used, or a folder holds none that can.
    """
    named = {Path(path) for path in paths}
    files = log_files(paths)
    stems = [file.stem for file in files]
    runs: list[Run] = []
    left_out: list[str] = []
    for file in files:
        try:
            # a named one may be a pipe
            if file not in named and file.exists() and not file.is_file():
                raise RunError(f"{file} is no file")
            run = read(
                file,
                as_text(file.stem if stems.count(file.stem) == 1 else str(file.with_suffix(""))),
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


def as_text(name: str) -> str:
    """A name from a log or a file system, fit to be shown: one line, without control characters and
    halves of characters."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in name)


def read(path: Path, name: str) -> Run:
    """The readable part of a log; `notes` name the rest.

    Raises:
        RunError: there is no such file, it cannot be read, is empty, or holds no line of a clipper.
    """
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            found = _Lines()
            for number, line in enumerate(file, 1):
                found.take(number, line)
    except OSError as error:
        raise RunError(
            f"{path}: {error.strerror or error}; pass the file that JSONLSink wrote"
        ) from error
    if not found.rows:
        what = (
            f"none of its {len(found.bad)} lines is a report of distclip"
            if found.bad
            else "it is empty"
        )
        raise RunError(
            f"{path}: {what}; write one with GradClipper(..., "
            'sinks=[distclip.JSONLSink("run.jsonl")])'
        )
    return found.run(path, name)


class _Lines:
    """Takes a file line by line. A step that comes again replaces the earlier one: a run was
    resumed into the same file."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[float, ...]] = {}
        self.bad: list[int] = []
        self._cut = False  # the last line is no report and has no end
        self.skips: dict[int, Skip] = {}
        self._vectors: dict[str, dict[int, Tensor]] = {"group": {}, "layer": {}}
        self._names: dict[str, tuple[str, ...]] = {"group": (), "layer": ()}
        self._stride, self._kept, self._again, self._last, self._norm_type = 1, 0, 0, 0, 2.0
        self._limits: tuple[float, ...] = ()

    def take(self, number: int, line: str) -> None:
        if not line.strip():
            return
        try:
            said = json.loads(line)
            step, row = _step(said["step"]), _row(said)
            skip = _skip(step, said)
            vectors = {
                "group": _vector(said, "groups", "group_norms"),
                "layer": _vector(said, "layers", "layer_norms"),
            }
            limits = tuple(_number(t, math.inf) for t in said.get("threshold", ()))
            norm_type = _number(said.get("norm_type", 2.0), math.inf)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            self.bad.append(number)
            self._cut = not line.endswith("\n")
            return
        self._again += step in self.rows
        self._limits = limits or self._limits
        self.rows[step], self._last, self._norm_type = row, step, norm_type
        self.skips.pop(step, None)
        if skip is not None:
            self.skips[step] = skip
        for kind, vector in vectors.items():
            self._vectors[kind].pop(step, None)
            if vector is not None and step % self._stride == 0:
                self._keep(kind, step, *vector)

    def _keep(self, kind: str, step: int, names: tuple[str, ...], norms: Tensor) -> None:
        if names != self._names[kind]:  # the clipper was rebuilt: the latest groups count
            self._names[kind], self._vectors[kind] = names, {}
        self._vectors[kind][step] = norms
        self._kept += len(names)
        if self._kept > _MOST_NUMBERS:
            self._stride *= 2
            for which, vectors in self._vectors.items():
                self._vectors[which] = {s: v for s, v in vectors.items() if s % self._stride == 0}
            self._kept = sum(len(v) for vectors in self._vectors.values() for v in vectors.values())

    def run(self, path: Path, name: str) -> Run:
        steps = sorted(self.rows)
        table = torch.tensor([self.rows[step] for step in steps], dtype=torch.float64)
        norm, after, clipped, skipped, coef, threshold, cosine, rate = table.unbind(1)
        rate = torch.where(rate.isnan(), _rolling(clipped), rate)
        parts: list[Parts] = []
        for kind, vectors in self._vectors.items():
            if len(self._names[kind]) > 1 and vectors:
                known = sorted(vectors)
                parts.append(
                    Parts(
                        self._names[kind],
                        torch.tensor(known),
                        torch.stack([vectors[s] for s in known]).double(),
                        kind,
                    )
                )
        return Run(
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
            notes=tuple(self._notes(path)),
        )

    def _notes(self, path: Path) -> Iterable[str]:
        bad = self.bad[:-1] if self._cut else self.bad
        if bad:
            count = "1 line is" if len(bad) == 1 else f"{len(bad)} lines are"
            yield f"{path}: {count} no report of distclip and left out: {_ranges(bad)}"
        if self._cut:
            yield (
                f"{path}: line {self.bad[-1]}, the last, is cut short and left out: the run goes "
                f"on, or was ended while it wrote"
            )
        if self._again:
            count = "1 step is" if self._again == 1 else f"{self._again} steps are"
            yield (
                f"{path}: {count} there more than once (a run that was resumed?); the later line "
                f"counts"
            )
        if self._last < max(self.rows):
            last = max(self.rows)
            yield (
                f"{path}: its last line is step {self._last}, yet step {last} stands before it; "
                f"were two runs written to one file?"
            )


def _row(said: Mapping[str, Any]) -> tuple[float, ...]:
    """Norm before and after, clipped, skipped, coefficient, threshold, cosine, clip rate of one
    line."""
    coefs = [_number(c) for c in said.get("coefs", ())]
    cosines = [_number(c) for c in said.get("cosine", ())]
    thresholds = {_number(t, math.inf) for t in said.get("threshold", ())} - {math.inf}
    return (
        _number(said["total_norm"]),
        _number(said.get("norm_after")),
        float(bool(said.get("clipped", False))),
        float(bool(said.get("skipped", False))),
        min(coefs) if coefs else math.nan,
        thresholds.pop() if len(thresholds) == 1 else math.nan,
        min(cosines) if cosines else math.nan,
        _number(said.get("clip_rate")),
    )


def _step(value: Any) -> int:
    step = int(value)
    if not 0 <= step < 1 << 53:
        raise ValueError("no step")
    return step


def _number(value: Any, absent: float = math.nan) -> float:
    """JSONLSink writes inf and NaN as null."""
    if value is None:
        return absent
    number = float(value)
    return number if math.isfinite(number) else absent


def _skip(step: int, said: Mapping[str, Any]) -> Skip | None:
    if not said.get("skipped"):
        return None
    who = tuple(
        f"{as_text(str(c['parameter']))} on rank {c['rank']}: {c['kind']}"
        for c in said.get("culprits", ())
    )
    return Skip(step, int(said.get("nonfinite", 0)), _number(said["total_norm"]), who)


def _vector(
    said: Mapping[str, Any], names: str, norms: str
) -> tuple[tuple[str, ...], Tensor] | None:
    """Names and norms, where the line has them."""
    values = [_number(n) for n in said.get(norms) or ()]
    called = tuple(as_text(str(name)) for name in said.get(names) or ())
    return (
        (called, torch.tensor(values, dtype=torch.float32))
        if values and len(values) == len(called)
        else None
    )


def _rolling(clipped: Tensor) -> Tensor:
    """[steps]: share of the last ≤ 500 that were clipped, for logs without clip_rate."""
    total = clipped.cumsum(0)
    before = torch.cat(
        [total.new_zeros(min(_WINDOW, len(total))), total[: max(0, len(total) - _WINDOW)]]
    )
    return (total - before) / torch.arange(1, len(total) + 1).clamp(max=_WINDOW)


def _ranges(numbers: Sequence[int], most: int = 8) -> str:
    """1, 2, 3, 7 → "lines 1-3, 7"."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    said = ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in spans[:most])
    more = sum(b - a + 1 for a, b in spans[most:])
    return f"line{'s' if len(numbers) > 1 else ''} {said}" + (f" and {more} more" if more else "")
