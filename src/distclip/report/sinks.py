"""Sinks that need nothing but Python: a JSONL file and Python's logging."""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from distclip.decide.matters import WINDOW
from distclip.errors import ConfigError
from distclip.records import ClipReport

# With many groups these make most of a line: one entry a group each.
GROUP_FIELDS = ("groups", "group_norms", "coefs", "threshold", "cosine")


class JSONLSink:
    """One JSON object a line and step, flushed at once; inf and NaN are written as null.

    A header stands before the first step, and again where another process, or the same one after
    `rebuild()`, goes on: `distclip_log` (the schema's version), date, policy, groups, norm_type,
    world size, layers, the plan's rows, versions, launcher and device. A step's line holds what
    `ClipReport.to_dict()` gives. With G groups it has 5 G entries, several hundred kB for 10,000
    groups: then write those only now and then. `distclip report` and `distclip suggest` read lines
    of all kinds.

    Args:
        path: appended to; folders are made. None on a rank that does not write.
        groups_every: where there are several groups, write what is one entry a group (`groups`,
            `group_norms`, `coefs`, `threshold`, `cosine`) only at each `groups_every`-th step, and
            at all that matter (`ClipReport.matters`).
        run: a name of the run, for the header.

    Raises:
        ConfigError: `path` is no path, or `groups_every` not a whole number of at least 1.
    """

    def __init__(
        self, path: str | PathLike[str] | None, groups_every: int = 1, run: str | None = None
    ) -> None:
        if path is not None and not isinstance(path, (str, PathLike)):
            raise ConfigError(
                f"JSONLSink: path={path!r} is no path; pass a file's name, or None on a rank that "
                "does not write"
            )
        if run is not None and not isinstance(run, str):
            raise ConfigError(f"JSONLSink: run={run!r} is no text; pass the run's name, or None")
        self.path, self.run = None if path is None else Path(path), run
        self.groups_every = checked_every("JSONLSink", groups_every, "groups_every")

    @property
    def lacks(self) -> str:
        """What it cannot write without, or an empty text."""
        return "its path is None" if self.path is None else ""

    def begin(self, header: Mapping[str, Any]) -> None:
        self._append({**header, "run": self.run})

    def write(self, report: ClipReport) -> None:
        said = report.to_dict()
        if len(report.groups) > 1 and not is_due(report, self.groups_every):
            said = {name: value for name, value in said.items() if name not in GROUP_FIELDS}
        self._append(said)

    def _append(self, said: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_without_nonfinite(said), allow_nan=False) + "\n")


class LoggingSink:
    """One line a step through Python's logging: warnings for skipped steps, else `level`.

    Args:
        logger: default "distclip".
        level: of ordinary steps.
        every: log each `every`-th step, and all that matter (`ClipReport.matters`).

    Raises:
        ConfigError: `logger` has no `log`, `level` is no number, or `every` is not a whole number
            of at least 1.
    """

    def __init__(
        self, logger: logging.Logger | None = None, level: int = logging.INFO, every: int = 1
    ) -> None:
        if logger is not None and not callable(getattr(logger, "log", None)):
            raise ConfigError(
                f"LoggingSink: logger={logger!r} has no log(level, text); pass what "
                "logging.getLogger(name) gives, or None for the logger distclip"
            )
        if not isinstance(level, int):
            raise ConfigError(
                f"LoggingSink: level={level!r} is no level; pass a number, such as logging.INFO"
            )
        self.logger = logging.getLogger("distclip") if logger is None else logger
        self.level = level
        self.every = checked_every("LoggingSink", every)
        self._taken: deque[float] = deque(maxlen=WINDOW)  # steps that were taken

    def write(self, report: ClipReport) -> None:
        norm = report.total_norm.item()
        if report.skipped.item():
            self.logger.warning("step %d skipped: %s", report.step, self._skip_reason(report, norm))
            return
        self._taken.append(norm)
        if is_due(report, self.every):
            coefs = ", ".join(f"{c:.4g}" for c in report.coefs[:4].tolist()) + (
                ", …" if len(report.coefs) > 4 else ""
            )
            apart = _outlier_text(report)
            text = "step %d: norm %.6g, coefficient %s%s"
            self.logger.log(self.level, text, report.step, norm, coefs, apart)

    def _skip_reason(self, report: ClipReport, norm: float) -> str:
        bad = int(report.nonfinite.item())
        if bad or not math.isfinite(norm):
            who = "; ".join(f"{c.parameter} on rank {c.rank}: {c.kind}" for c in report.culprits)
            what = "1 gradient is" if bad == 1 else f"{bad} gradients are" if bad else "the norm is"
            return f"{what} not finite" + (f": {who}" if who else "")
        if report.ended_in == "AgreementError":
            return f"copies of gradients differ, which is an error: norm {norm:.6g}"
        # not the threshold: a policy that skips steps may clip at another norm than it skips at
        before = (
            f", the {len(self._taken)} steps taken before had at most {max(self._taken):.6g}"
            if self._taken
            else ""
        )
        return f"left out by the policy: norm {norm:.6g}{before}"


def _outlier_text(report: ClipReport) -> str:
    """How far an outlier lies from the steps before, and which watched layer has most of it."""
    if report.matters != "outlier" or report.deviation is None:
        return ""
    text = f", {report.deviation:+.1f} robust deviations from the steps before"
    if not report.layers:
        return text
    share, at = report.layer_shares.max(0)
    most = f": {100 * float(share):.0f} % of its power" if math.isfinite(report.norm_type) else ""
    return f"{text}, most of it in {report.layers[int(at)]}{most}"


def is_due(report: ClipReport, every: int) -> bool:
    """Whether a sink with an interval writes this step: each `every`-th, and all that matter."""
    return report.step % every == 0 or report.matters is not None


def checked_every(sink: str, every: Any, argument: str = "every") -> int:
    """A sink's interval in steps.

    Raises:
        ConfigError: it is not a whole number of at least 1.
    """
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ConfigError(
            f"{sink}: {argument}={every!r} must be a whole number of steps, at least "
            f"1; 1 writes at every step"
        )
    return every


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nonfinite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
