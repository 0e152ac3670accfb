"""`distclip doctor`: does clipping work on this cluster? Facts, checks against a float64 oracle,
and a remedy where one fails."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TextIO

import torch
import torch.distributed as dist

import distclip
from distclip.cli import silence_stream
from distclip.cli.doctor import frameworks
from distclip.cli.doctor.clip_checks import REPORT_FAULT, LayoutCheck, OverflowCheck
from distclip.cli.doctor.facts import cannot_start, collect_facts, device_for, judge_facts
from distclip.cli.doctor.layouts import LAYOUTS
from distclip.cli.doctor.output import DoctorOutput, as_json, as_table
from distclip.cli.doctor.records import (
    CannotRun,
    CheckContext,
    CheckResult,
    DoctorCheck,
    Observation,
    RankInfo,
    name_ranks,
    ranks_by_value,
)
from distclip.cli.doctor.speed_checks import LatencyCheck, SpeedCheck
from distclip.cli.doctor.store import StatusStore, read_rank_info
from distclip.cli.doctor.watchdog import Watchdog

CHECKS: tuple[DoctorCheck, ...] = (
    *(LayoutCheck(layout) for layout in LAYOUTS),
    OverflowCheck(),
    LatencyCheck(),
    SpeedCheck(),
)
# after these errors a process group cannot be used any more
BROKEN_GROUP = re.compile(r"ExchangeError|gloo|nccl|timed? ?out|connection", re.IGNORECASE)


def run(options: argparse.Namespace) -> int:
    """On every rank; returns the exit code, the same on all."""
    if options.list:
        if os.environ.get("RANK", "0") == "0":
            print("\n".join(f"{check.name:<10}{check.line}" for check in CHECKS))
        return 0
    if options.framework:
        return frameworks.run(options)
    findings = DoctorOutput()
    chosen = [check for check in CHECKS if not options.only or check.name in options.only]

    def show(stopped: str = "") -> None:
        findings.stopped = stopped
        known = {result.name for result in findings.results}
        findings.results += [
            CheckResult(check.name, "not run", "stopped before its end")
            for check in chosen
            if check.name not in known
        ]
        try:
            print(as_json(findings) if options.json else as_table(findings), file=out, flush=True)
        except BrokenPipeError:  # the reader has exited; the exit code still shows the result
            silence_stream(out)

    try:
        info = read_rank_info(options.timeout)
        status_store = StatusStore(info)
    except CannotRun as error:
        print(f"distclip doctor: {error}", file=sys.stderr)
        return 2
    with _stdout_for_results() as out, Watchdog(status_store, show) as watch:
        try:
            return CheckRunner(info, status_store, watch, findings, show).run(
                chosen, options.backend
            )
        except Exception as error:
            traceback.print_exc()
            watch.exit_process(
                2, f"{type(error).__name__}: {error}"
            )  # the other ranks name the error


@contextmanager
def _stdout_for_results() -> Generator[TextIO]:
    """Standard output for the results alone; what libraries write there meanwhile goes to standard
    error: gloo of torch 2.8 and 2.9 prints its connections."""
    out = sys.stdout
    try:
        ours = out.fileno() == 1
    except OSError:  # standard output is captured
        ours = False
    if not ours:
        yield out
        return
    out.flush()
    with os.fdopen(os.dup(1), "w") as kept:
        os.dup2(2, 1)
        try:
            yield kept
        finally:
            os.dup2(kept.fileno(), 1)


class CheckRunner:
    """Runs the checks in turn. Rank 0 judges each by the observations of all ranks, and publishes
    whether to continue."""

    def __init__(
        self,
        info: RankInfo,
        status_store: StatusStore,
        watch: Watchdog,
        findings: DoctorOutput,
        show: Callable[[str], None],
    ) -> None:
        self._info, self._status_store, self._watch, self._findings, self._show = (
            info,
            status_store,
            watch,
            findings,
            show,
        )

    def run(self, checks: Sequence[DoctorCheck], backend: str | None) -> int:
        try:
            backend_name, device = device_for(self._info, backend)
            mine = collect_facts(self._info, backend_name, device)
        # ConfigError: the requested kernel is not available
        except (CannotRun, distclip.ConfigError) as error:
            backend_name, device, mine = "", torch.device("cpu"), {"cannot": str(error)}
        stop = self._exchange_verdict("start", mine, self._judge_facts)
        if not stop and self._info.size > 1:
            self._watch.enter_stage("start of the process group")
            # NCCL's own watchdog aborts the process after the time-out without naming the missing
            # rank: ours must come first
            self._status_store.start_group(
                backend_name, self._info.timeout_s * (3 if "nccl" in backend_name else 1)
            )
        self._findings.hint = more_ranks(checks, self._info.size)
        broken = ""
        for check in checks if not stop else ():
            lacking = check.unmet_requirement(self._info.size) or broken
            if lacking:
                self._findings.results.append(CheckResult(check.name, "not run", lacking))
            else:
                broken = self._exchange_verdict(
                    check.name, self._observe(check, device), partial(self._judge_check, check)
                )
        code = self._exchange_verdict("end", {}, lambda _: self._show_findings(stop))
        self._watch.mark_concluded()
        if broken:  # the process group's threads may hang at the interpreter's exit
            self._watch.exit_process(code)
        if dist.is_initialized():
            self._watch.enter_stage("end of the process group")
            dist.destroy_process_group()
        self._watch.sign_off("done")
        return int(code)

    def _exchange_verdict(
        self, topic: str, mine: Observation, judge: Callable[[list[Observation]], Any]
    ) -> Any:
        """Publish this rank's observation; return what rank 0's `judge` makes of those of all
        ranks."""
        raised = str(mine.get("raised", ""))
        # after a broken collective the others are waited for a short while only: theirs has ended
        # too
        grace = self._info.grace_s
        wait = grace if BROKEN_GROUP.search(raised) else self._info.timeout_s + grace
        self._watch.enter_meeting(raised or f"{topic}: done, waiting for the others", wait)
        self._status_store.publish(topic, mine)
        try:
            if self._info.rank == 0:
                self._status_store.publish(
                    f"word on {topic}", judge(self._status_store.collect(topic, wait))
                )
            return self._status_store.collect(f"word on {topic}", wait, [0])[0]
        except TimeoutError:
            self._watch.end_process(raised or f"not every rank came to the end of {topic}")

    def _judge_facts(self, everyone: list[Observation]) -> str:
        stop = cannot_start(everyone)
        if not stop:
            self._findings.facts = everyone
            self._findings.results.append(judge_facts(everyone))
        return stop

    def _observe(self, check: DoctorCheck, device: torch.device) -> Observation:
        def stage(step: str, sends: str) -> None:
            self._watch.enter_stage(f"{check.name}: {step} ({sends})")

        try:
            return check.run(CheckContext(self._info.rank, self._info.size, device, stage))
        except Exception as error:
            return {
                "raised": f"{self._watch.current_stage}: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:600]}"
            }

    def _judge_check(self, check: DoctorCheck, everyone: list[Observation]) -> str:
        """Add the result. Returns why the process group cannot be used any more, or an empty
        text."""
        raised = ranks_by_value([one.get("raised", "") for one in everyone])
        untouched = raised.pop("", [])
        if not raised:
            self._findings.results.append(check.judge(everyone))
            return ""
        text = "; ".join(f"{name_ranks(ranks)}: {error}" for error, ranks in raised.items())
        self._findings.results.append(
            CheckResult(
                check.name,
                "fail",
                text,
                "do as the error says; if it says nothing to do, " + REPORT_FAULT,
            )
        )
        usable = not untouched and not BROKEN_GROUP.search(text) and len(raised) == 1
        return (
            ""
            if usable
            else f"after {check.name} the process group is of no more use; run it with --only"
        )

    def _show_findings(self, stop: str) -> int:
        self._show(stop)
        return self._findings.exit_code


def more_ranks(checks: Sequence[DoctorCheck], size: int) -> str:
    """The command line for the checks that need more ranks than `size`, or an empty text."""
    lacking = [check.name for check in checks if check.unmet_requirement(size)]
    if not lacking:
        return ""
    enough = next(
        ranks
        for ranks in itertools.count(size)
        if not any(check.unmet_requirement(ranks) for check in checks)
    )
    count = "1 check needs" if len(lacking) == 1 else f"{len(lacking)} checks need"
    return f"{count} more ranks than {size}: torchrun --nproc-per-node {enough} -m distclip doctor"
