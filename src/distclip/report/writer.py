"""Reports → sinks. The only stage that a training run needs the host for."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeAlias, cast

from distclip.exchange.readback import Readback
from distclip.records import ClipReport, Culprit
from distclip.setup.options import why_unwritable


class Sink(Protocol):
    """Takes each report, on the first rank of the clipper's group alone.

    Two things more it may have. An attribute `lacks` that is not empty: it cannot write for that
    reason, which the world's first rank raises at set-up. A method `begin(header)`: it is called
    before the first report, and anew after `rebuild()`, with what a log says of its run (a
    dictionary of plain Python values, as `JSONLSink` writes it).
    """

    def write(self, report: ClipReport) -> None: ...


SinkLike: TypeAlias = "Sink | Callable[[ClipReport], object]"


class ReportWriter:
    """Gives reports to the sinks: at once, or one call late where the host must not wait for the
    device.

    Args:
        sinks: of a rank that writes; those that cannot write are left out.
        header: what a log says of the run.
    """

    def __init__(
        self, sinks: Sequence[SinkLike | None] | None = (), header: Mapping[str, Any] | None = None
    ) -> None:
        self._sinks = [
            sink for sink in sinks or () if sink is not None and not why_unwritable(sink)
        ]
        self._header = header or {}
        self._begun = set[int]()  # identities
        self._late: Readback[ClipReport] = Readback()
        self._culprits: tuple[Culprit, ...] = ()

    @property
    def num_sinks(self) -> int:
        """Those that still write."""
        return len(self._sinks)

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
                if id(sink) not in self._begun:
                    self._begun.add(id(sink))
                    begin = getattr(sink, "begin", None)
                    if callable(begin):
                        begin(self._header)
                write = getattr(sink, "write", sink)
                cast("Callable[[ClipReport], object]", write)(report)
            except Exception as error:
                self._sinks.remove(sink)
                _warn_or_log(
                    f"{_name_of(sink)} failed at step {report.step} and is off from now on, "
                    f"training goes on: "
                    f"{type(error).__name__}: {error}"
                )


def _name_of(sink: SinkLike) -> str:
    """Of its class; of a function its own."""
    return getattr(sink, "__name__", type(sink).__name__)


def _warn_or_log(text: str) -> None:
    """A warning; in the log where warnings are errors, since one on this rank alone would leave the
    others waiting."""
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=6)
    except RuntimeWarning:
        logging.getLogger("distclip").warning(text)
