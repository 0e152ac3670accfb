"""`distclip doctor`: does clipping work on this cluster? Facts, checks against a float64 oracle,
and what to do where one fails."""

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
from distclip.cli import silence
from distclip.cli.doctor.clip_checks import REPORT, LayoutCheck, Overflow
from distclip.cli.doctor.facts import cannot_start, device_for, facts, judge_facts
from distclip.cli.doctor.layouts import LAYOUTS
from distclip.cli.doctor.output import Findings, as_json, as_table
from distclip.cli.doctor.records import (
    CannotRun,
    Check,
    CheckContext,
    Observation,
    RankInfo,
    Result,
    by_value,
    spans,
)
from distclip.cli.doctor.speed_checks import Latency, Speed
from distclip.cli.doctor.store import StatusStore, read_place
from distclip.cli.doctor.watchdog import Watchdog

CHECKS: tuple[Check, ...] = (
    *(LayoutCheck(layout) for layout in LAYOUTS),
    Overflow(),
    Latency(),
    Speed(),
)
# after these a process group is of no more use
BROKEN = re.compile(r"ExchangeError|gloo|nccl|timed? ?out|connection", re.IGNORECASE)


def run(options: argparse.Namespace) -> int:
    """On every rank; the exit code, equal on all."""
    if options.list:
        if os.environ.get("RANK", "0") == "0":
            print("\n".join(f"{check.name:<10}{check.line}" for check in CHECKS))
        return 0
    findings = Findings()
    chosen = [check for check in CHECKS if not options.only or check.name in options.only]

    def show(stopped: str = "") -> None:
        findings.stopped = stopped
        known = {result.name for result in findings.results}
        findings.results += [
            Result(check.name, "not run", "stopped before its end")
            for check in chosen
            if check.name not in known
        ]
        try:
            print(as_json(findings) if options.json else as_table(findings), file=out, flush=True)
        except BrokenPipeError:  # nobody reads on; the exit code still tells
            silence(out)

    try:
        place = read_place(options.timeout)
        board = StatusStore(place)
    except CannotRun as error:
        print(f"distclip doctor: {error}", file=sys.stderr)
        return 2
    with _answers_alone() as out, Watchdog(board, show) as watch:
        try:
            return Examination(place, board, watch, findings, show).run(chosen, options.backend)
        except Exception as error:
            traceback.print_exc()
            watch.leave(2, f"{type(error).__name__}: {error}")  # the others' texts will name it


@contextmanager
def _answers_alone() -> Generator[TextIO]:
    """Standard output; what libraries write there meanwhile goes to standard error: gloo, of torch
    2.8 and 2.9, tells how it connects."""
    out = sys.stdout
    try:
        ours = out.fileno() == 1
    except OSError:  # somebody collects it
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


class Examination:
    """The checks in turn. Rank 0 judges each by what all ranks saw, and tells them whether to go
    on."""

    def __init__(
        self,
        place: RankInfo,
        board: StatusStore,
        watch: Watchdog,
        findings: Findings,
        show: Callable[[str], None],
    ) -> None:
        self._place, self._board, self._watch, self._findings, self._show = (
            place,
            board,
            watch,
            findings,
            show,
        )

    def run(self, checks: Sequence[Check], backend: str | None) -> int:
        try:
            asked, device = device_for(self._place, backend)
            mine = facts(self._place, asked, device)
        # the latter of the kernel that was asked for
        except (CannotRun, distclip.ConfigError) as error:
            asked, device, mine = "", torch.device("cpu"), {"cannot": str(error)}
        stop = self._confer("start", mine, self._judge_facts)
        if not stop and self._place.size > 1:
            self._watch.stage("start of the process group")
            # NCCL's own watchdog aborts the process after the time-out, without a word on who is
            # missing: ours comes first
            self._board.start_group(asked, self._place.timeout_s * (3 if "nccl" in asked else 1))
        self._findings.hint = more_ranks(checks, self._place.size)
        broken = ""
        for check in checks if not stop else ():
            lacking = check.lacks(self._place.size) or broken
            if lacking:
                self._findings.results.append(Result(check.name, "not run", lacking))
            else:
                broken = self._confer(
                    check.name, self._seen(check, device), partial(self._judge, check)
                )
        code = self._confer("end", {}, lambda _: self._conclude(stop))
        self._watch.conclude()
        if broken:  # its threads may hang at the interpreter's end
            self._watch.leave(code)
        if dist.is_initialized():
            self._watch.stage("end of the process group")
            dist.destroy_process_group()
        self._watch.part("done")
        return int(code)

    def _confer(
        self, topic: str, mine: Observation, judge: Callable[[list[Observation]], Any]
    ) -> Any:
        """Tell what this rank saw; the word that rank 0 finds in what all saw."""
        raised = str(mine.get("raised", ""))
        # who comes out of a broken collective waits for the others a short while only: theirs has
        # ended too
        grace = self._place.grace_s
        wait = grace if BROKEN.search(raised) else self._place.timeout_s + grace
        self._watch.meet(raised or f"{topic}: done, waiting for the others", wait)
        self._board.tell(topic, mine)
        try:
            if self._place.rank == 0:
                self._board.tell(f"word on {topic}", judge(self._board.collect(topic, wait)))
            return self._board.collect(f"word on {topic}", wait, [0])[0]
        except TimeoutError:
            self._watch.end(raised or f"not every rank came to the end of {topic}")

    def _judge_facts(self, everyone: list[Observation]) -> str:
        stop = cannot_start(everyone)
        if not stop:
            self._findings.facts = everyone
            self._findings.results.append(judge_facts(everyone))
        return stop

    def _seen(self, check: Check, device: torch.device) -> Observation:
        def stage(step: str, sends: str) -> None:
            self._watch.stage(f"{check.name}: {step} ({sends})")

        try:
            return check.run(CheckContext(self._place.rank, self._place.size, device, stage))
        except Exception as error:
            return {
                "raised": f"{self._watch.where}: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:600]}"
            }

    def _judge(self, check: Check, everyone: list[Observation]) -> str:
        """Adds the result. What keeps the process group from further use, or an empty text."""
        raised = by_value([one.get("raised", "") for one in everyone])
        untouched = raised.pop("", [])
        if not raised:
            self._findings.results.append(check.judge(everyone))
            return ""
        text = "; ".join(f"{spans(ranks)}: {said}" for said, ranks in raised.items())
        self._findings.results.append(
            Result(
                check.name,
                "fail",
                text,
                "do as the error says; if it says nothing to do, " + REPORT,
            )
        )
        usable = not untouched and not BROKEN.search(text) and len(raised) == 1
        return (
            ""
            if usable
            else f"after {check.name} the process group is of no more use; run it with --only"
        )

    def _conclude(self, stop: str) -> int:
        self._show(stop)
        return self._findings.exit_code


def more_ranks(checks: Sequence[Check], size: int) -> str:
    """How those checks are run that this world is too small for, or an empty text."""
    lacking = [check.name for check in checks if check.lacks(size)]
    if not lacking:
        return ""
    enough = next(
        ranks for ranks in itertools.count(size) if not any(check.lacks(ranks) for check in checks)
    )
    count = "1 check needs" if len(lacking) == 1 else f"{len(lacking)} checks need"
    return f"{count} more ranks than {size}: torchrun --nproc-per-node {enough} -m distclip doctor"
