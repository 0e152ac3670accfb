"""Reports → sinks. The only stage that a training run needs the host for."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from distclip.exchange.readback import Readback
from distclip.records import ClipReport, Culprit


class Sink(Protocol):
    """Takes each report, on the first rank of the clipper's group alone.

    If it has an attribute `lacks` that is not empty, it cannot write for that reason, and that rank
    raises it at set-up.
    """

    def write(self, report: ClipReport) -> None: ...


class ReportWriter:
    """Gives reports to the sinks: at once, or one call late where the host must not wait for the
    device."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)
        self._late: Readback[ClipReport] = Readback()
        self._culprits: tuple[Culprit, ...] = ()

    def write(self, report: ClipReport, late: bool) -> None:
        if not self._sinks:
            return
        self.flush()
        if late:
            self._late.enqueue(report.packed(), report)
        else:
            self._write_to_sinks(report)

    def add_culprits(self, culprits: tuple[Culprit, ...]) -> None:
        """Culprits of the report that is not yet written: they were found when its call was
        checked."""
        self._culprits = culprits

    def flush(self) -> None:
        """Write the report that is still queued, if there is one."""
        late = self._late.dequeue()
        if late is not None:
            self._write_to_sinks(
                replace(
                    late.what.unpacked(late.numbers), culprits=late.what.culprits or self._culprits
                )
            )
        self._culprits = ()

    def _write_to_sinks(self, report: ClipReport) -> None:
        """A failing sink warns once and is disabled: training is worth more than its log."""
        for sink in list(self._sinks):
            try:
                sink.write(report)
            except Exception as error:
                self._sinks.remove(sink)
                _warn_or_log(
                    f"{type(sink).__name__} failed at step {report.step} and is off from now on, "
                    f"training goes on: "
                    f"{type(error).__name__}: {error}"
                )


def _warn_or_log(text: str) -> None:
    """A warning; in the log where warnings are errors, since one on this rank alone would leave the
    others waiting."""
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=6)
    except RuntimeWarning:
        logging.getLogger("distclip").warning(text)
