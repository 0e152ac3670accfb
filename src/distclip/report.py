"""Stage 8: reports → sinks. The only stage that a training run needs the host for."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from distclip.host import Mirror
from distclip.records import ClipReport, Culprit


class Sink(Protocol):
    """Takes each report, on the first rank of the clipper's group alone."""

    def write(self, report: ClipReport) -> None: ...


class JSONLSink:
    """One JSON object a line and step, flushed at once; inf and NaN are written as null.

    Args:
        path: appended to; folders are made.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)

    def write(self, report: ClipReport) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_without_nonfinite(report.to_dict()), allow_nan=False) + "\n")


class LoggingSink:
    """One line a step through Python's logging: warnings for skipped steps, else `level`.

    Args:
        logger: default "distclip".
        level: of ordinary steps.
        every: log each `every`-th step, and all skipped ones.
    """

    def __init__(self, logger: logging.Logger | None = None, level: int = logging.INFO, every: int = 1) -> None:
        self.logger, self.level, self.every = logger or logging.getLogger("distclip"), level, every

    def write(self, report: ClipReport) -> None:
        said = report.to_dict()
        if said["skipped"]:
            who = "; ".join(f"{c['parameter']} on rank {c['rank']}: {c['kind']}" for c in said["culprits"])
            what = "1 gradient is" if said["nonfinite"] == 1 else f"{said['nonfinite']} gradients are"
            self.logger.warning("step %d skipped: %s not finite%s", said["step"], what, f": {who}" if who else "")
        elif report.step % self.every == 0:
            coefs = ", ".join(f"{c:.4g}" for c in said["coefs"][:4]) + (", …" if len(said["coefs"]) > 4 else "")
            self.logger.log(self.level, "step %d: norm %.6g, coefficient %s", said["step"], said["total_norm"], coefs)


class Writer:
    """Gives reports to the sinks: at once, or one call late where the host is not to wait for the device."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)
        self._left: Mirror[ClipReport] = Mirror()
        self._culprits: tuple[Culprit, ...] = ()

    def write(self, report: ClipReport, late: bool) -> None:
        if not self._sinks:
            return
        self.flush()
        if late:
            self._left.leave(report.packed(), report)
        else:
            self._give(report)

    def amend(self, culprits: tuple[Culprit, ...]) -> None:
        """Culprits of the report that is still here: they were found when its call was judged."""
        self._culprits = culprits

    def flush(self) -> None:
        """Give what is left, if anything is."""
        left = self._left.taken()
        if left is not None:
            self._give(replace(left.what.unpacked(left.numbers), culprits=left.what.culprits or self._culprits))
        self._culprits = ()

    def _give(self, report: ClipReport) -> None:
        """One that fails is told once and left out from then on: training is worth more than its log."""
        for sink in list(self._sinks):
            try:
                sink.write(report)
            except Exception as error:
                self._sinks.remove(sink)
                warnings.warn(
                    f"{type(sink).__name__} failed at step {report.step} and is off from now on, training goes on: "
                    f"{type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=5,
                )


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nonfinite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
