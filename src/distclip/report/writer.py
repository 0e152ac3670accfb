"""Reports → sinks. The only stage that a training run needs the host for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, Protocol, TypeAlias, cast

import torch

from distclip.decide.decision import StepStatus
from distclip.decide.matters import NormWindow
from distclip.decide.warn import warn_or_log
from distclip.exchange.readback import Readback
from distclip.records import ClipReport
from distclip.setup.options import why_unwritable


class Sink(Protocol):
    """Takes each report, on the first rank of the clipper's group alone.

    What it raises is told by a warning, and it is off from then on. KeyboardInterrupt ends this
    rank, and SystemExit too unless the step ends in an error, which is raised then: the other ranks
    wait for this one until they time out, so a sink is no place to end a training.

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
        self.sinks = [  # those that still write
            sink for sink in sinks or () if sink is not None and not why_unwritable(sink)
        ]
        self._header = header or {}
        self._begun = set[int]()  # identities
        self._late: Readback[tuple[ClipReport, bool, bool]] = Readback()  # as `write` got it
        self._found: tuple[int, StepStatus] | None = None  # step, and what was found of it
        self.window = NormWindow()  # the clipper puts that of its steps here

    def write(self, report: ClipReport, late: bool, judged: bool, layers_due: bool) -> None:
        """Once the sinks have what was queued.

        Args:
            late: the report's numbers are read at the next call.
            judged: it says what was found; else that is told at the next call.
            layers_due: sinks get the watched layers even if the step does not matter.
        """
        self.flush()
        if late:
            self._late.enqueue(report.packed(), (report, judged, layers_due))
        else:
            self._write_to_sinks(report.on_host(), layers_due)

    def add_findings(self, step: int, status: StepStatus) -> None:
        """What was found of a step when it was judged, one call late: its report is not written
        yet."""
        self._found = step, status

    def flush(self) -> None:
        """Write the report that is still queued, if there is one."""
        late = self._late.dequeue()
        if late is None:
            return
        numbers, (report, judged, layers_due) = late
        report = report.unpacked(numbers)
        if not judged:
            report = replace(report, **self._found_of(report))
        self._write_to_sinks(report, layers_due)

    def _found_of(self, report: ClipReport) -> dict[str, Any]:
        """Fields of the report."""
        step, status = self._found or (0, None)
        self._found = None  # a step after a checkpoint was loaded may bear this number again
        if status is not None and step == report.step:
            names = "matters", "deviation", "culprits", "notes", "ended_in"
            return {name: getattr(status, name) for name in names}
        # The last step before the end of the program, which no call comes to judge, or one that was
        # judged by an error. A copy of the window says what it can: the window itself must not
        # learn on this rank alone.
        norm, window = (
            math.nan if report.nonfinite else report.total_norm.item(),
            deepcopy(self.window),
        )
        matters, deviation = window.judge(norm, bool(report.skipped), report.outlier_rank)
        return {"matters": matters, "deviation": deviation}

    def _write_to_sinks(self, report: ClipReport, layers_due: bool) -> None:
        """A failing sink warns once and is disabled: training is worth more than its log. One that
        exits the program does, except from a step that ends in an error: this rank raises that as
        all others do."""
        if report.layers and report.matters is None and not layers_due:
            none = torch.zeros(0, dtype=report.dtype, device="cpu")
            report = replace(report, layers=(), layer_norms=none)
        for sink in list(self.sinks):
            try:
                if id(sink) not in self._begun:
                    self._begun.add(id(sink))
                    begin = getattr(sink, "begin", None)
                    if callable(begin):
                        begin(self._header)
                write = getattr(sink, "write", sink)
                cast("Callable[[ClipReport], object]", write)(report)
            except (Exception, SystemExit) as error:
                ends = report.ended_in
                if isinstance(error, SystemExit) and ends is None:
                    raise  # the user's own end of the program
                self.sinks.remove(sink)
                ending = f", which ends in {ends}," if ends else ""
                warn_or_log(
                    f"{_name_of(sink)} failed at step {report.step}{ending} and is off from now on"
                    f"{'' if ends else ', training goes on'}: {type(error).__name__}: {error}"
                )


def _name_of(sink: SinkLike) -> str:
    """Of its class; of a function its own."""
    return getattr(sink, "__name__", type(sink).__name__)
