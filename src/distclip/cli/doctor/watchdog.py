"""A thread that ends this process, and names the missing ranks, when a stage does not end."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType, TracebackType
from typing import NoReturn

import torch.distributed as dist

from distclip.cli.doctor.store import StatusStore

BEAT_S = 1.0
SILENT_S = 2.5  # a rank whose beat has not changed for that long gives no sign of life
MEETING_STEP = 1000  # the step of every meeting: a rank that raised takes fewer steps to it
ASK_S = 5.0  # a store that does not answer a query for that long is gone


@dataclass(frozen=True, slots=True)
class SignOfLife:
    """A rank's last sign of life."""

    beat: int
    stage: list[int]  # the number of the next meeting, and of the step on the way to it
    text: str
    host: str
    ended: str  # empty while it runs


class Watchdog:
    """Publishes signs of life while it is open: `with Watchdog(...) as watch`.

    Args:
        on_lost: called on rank 0 with the error's text before the process ends with exit code 2,
            to print the findings so far.
    """

    def __init__(self, status_store: StatusStore, on_lost: Callable[[str], None]) -> None:
        self._status_store, self._info, self._on_lost = status_store, status_store.info, on_lost
        self._sign_store, self._query_store = (
            status_store.clone_connection(),
            status_store.clone_connection(),
        )
        # held by the thread that ends the process, the main one or the watchdog's
        self._lock = threading.Lock()
        self._beat, self._stage, self._text, self._deadline = (
            0,
            [0, 0],
            "start",
            time.monotonic() + self._info.timeout_s,
        )
        self._wakeup_read, self._wakeup_write = os.pipe()
        os.set_blocking(self._wakeup_write, False)
        self._concluded, self._closed, self._ended = False, False, ""
        self._silent = set[int]()  # ranks that give no sign of life
        self._thread = threading.Thread(target=self._watch_loop, daemon=True)

    def __enter__(self) -> Watchdog:
        # torchrun sends SIGTERM to the others when a rank dies. The main thread may be inside a
        # collective and never run a handler; the signal's number is written to the pipe all the
        # same, and the watchdog's thread reads it.
        self._previous_handlers = (
            signal.signal(signal.SIGTERM, _keep_signal_for_watchdog),
            signal.set_wakeup_fd(self._wakeup_write, warn_on_full_buffer=False),
        )
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed = True
        os.write(self._wakeup_write, b"\0")
        self._thread.join()
        signal.set_wakeup_fd(self._previous_handlers[1])
        signal.signal(signal.SIGTERM, self._previous_handlers[0])
        os.close(self._wakeup_read)
        os.close(self._wakeup_write)

    @property
    def current_stage(self) -> str:
        """The text of this rank's stage."""
        return self._text

    def enter_stage(self, text: str) -> None:
        """Begin the stage `text`, which may take the time-out and some grace."""
        meeting, step = self._stage
        self._set_stage(
            [meeting + 1, 0] if step == MEETING_STEP else [meeting, step + 1],
            text,
            self._info.timeout_s,
        )

    def enter_meeting(self, text: str, wait_s: float) -> None:
        """Begin to wait for all other ranks, for at most `wait_s` seconds and some grace. Every
        rank comes to every meeting."""
        meeting, step = self._stage
        self._set_stage([meeting + (step == MEETING_STEP), MEETING_STEP], text, wait_s)

    def mark_concluded(self) -> None:
        """The findings are printed: from now on a SIGTERM only means that other ranks have ended
        already."""
        self._concluded = True

    def _set_stage(self, stage: list[int], text: str, wait_s: float) -> None:
        self._stage, self._text, self._deadline = stage, text, time.monotonic() + wait_s
        self._publish_sign()

    def end_process(self, what: str) -> NoReturn:
        """Print what happened and which ranks did not answer, and end the process with code 2."""
        with self._lock:  # never released: the other thread must not end the process in the middle
            missing = self._find_missing()
            text = f"rank {self._info.rank} on {self._info.host}: {what}. {missing}"
            print(f"distclip doctor: {text}", file=sys.stderr, flush=True)
            if self._info.rank == 0:
                self._on_lost(text)
            self.exit_process(2, "lost")

    def exit_process(self, code: int, why: str = "done") -> NoReturn:
        """End the process at once, without the interpreter's clean-up, in which a broken process
        group may hang."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.sign_off(why)
        os._exit(code)

    def _watch_loop(self) -> None:
        while True:
            woken = select.select([self._wakeup_read], [], [], BEAT_S)[0]
            if self._closed:
                return
            if woken and signal.SIGTERM in os.read(self._wakeup_read, 64) and not self._concluded:
                self.end_process(
                    f"ended by SIGTERM in '{self._text}', which launchers send when a rank has died"
                )
            self._publish_sign()
            if time.monotonic() > self._deadline + self._info.grace_s:
                met = self._stage[1] == MEETING_STEP
                self.end_process(
                    f"after '{self._text}' no word came"
                    if met
                    else f"'{self._text}' did not end within {self._info.timeout_s:g} s"
                )

    def _publish_sign(self) -> None:
        self._beat += 1
        sign = [self._beat, self._stage, self._text, self._info.host, self._ended]
        try:
            self._sign_store.set(f"beat/{self._info.rank}", json.dumps(sign))
        except (dist.DistError, RuntimeError):
            return  # the store is gone: `end_process` reports it once a stage does not end

    def _find_missing(self) -> str:
        """The missing ranks, in words. Asked in a thread of its own: a store whose process was
        stopped does not answer, and its client has no time-out."""
        answers: list[str] = []

        def ask() -> None:
            try:
                first = self._read_signs()
                until = time.monotonic() + SILENT_S
                # the watchdog's thread may be waiting for this one: keep publishing signs for it
                while time.monotonic() < until:
                    time.sleep(BEAT_S / 2)
                    self._publish_sign()
                answers.append(self._describe_missing(first, self._read_signs()))
            except (dist.DistError, RuntimeError) as error:
                answers.append(
                    f"The store at {self._status_store.address} is gone "
                    f"({str(error).splitlines()[0]})" + self._host_of_store()
                )

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(ASK_S)
        return (
            answers[0]
            if answers
            else f"The store at {self._status_store.address} does not answer"
            + self._host_of_store()
        )

    def _host_of_store(self) -> str:
        if self._status_store.hosted_here and self._info.rank != 0:
            return (
                ", and rank 0 holds it: did not answer: rank 0 (lost, stopped, or it ended "
                "first: see its output)"
            )
        return ": the launcher's agent on the first node holds it; see its output"

    def _read_signs(self) -> dict[int, SignOfLife]:
        """The last sign of each rank that ever gave one. In few queries: thousands of ranks may ask
        at once."""
        self._query_store.set_timeout(timedelta(seconds=ASK_S))
        ranks = list(range(self._info.size))
        if not self._query_store.check([f"beat/{rank}" for rank in ranks]):
            ranks = [rank for rank in ranks if self._query_store.check([f"beat/{rank}"])]
        answers = self._query_store.multi_get([f"beat/{rank}" for rank in ranks])
        return {
            rank: SignOfLife(*json.loads(text)) for rank, text in zip(ranks, answers, strict=True)
        }

    def _describe_missing(self, first: dict[int, SignOfLife], last: dict[int, SignOfLife]) -> str:
        dead: list[str] = []
        elsewhere: list[str] = []
        for rank in range(self._info.size):
            before, sign = first.get(rank), last.get(rank)
            if rank == self._info.rank:
                continue
            if sign is None:
                self._silent.add(rank)
                dead.append(
                    f"rank {rank} (it never started, or cannot reach {self._status_store.address})"
                )
            elif sign.ended:
                dead += (
                    [f"rank {rank} on {sign.host} (it ended: {sign.ended})"]
                    if sign.ended not in ("lost", "done")
                    else []
                )
            elif before is not None and before.beat == sign.beat:
                self._silent.add(rank)
                dead.append(f"rank {rank} on {sign.host} (no sign of life; last in '{sign.text}')")
            elif sign.stage != self._stage:
                elsewhere.append(f"rank {rank} on {sign.host} (alive, in '{sign.text}')")
        if dead or elsewhere:
            return (
                f"Did not answer: {', '.join(dead or elsewhere)}. Look at the logs and the node of "
                "that rank"
            )
        if self._info.size == 1:
            return "Nothing else runs here: run with a larger --timeout"
        return (
            "Every other rank is alive and waits in the same place: the network between them does "
            "not carry this; see GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO, and "
            "firewalls"
        )

    def sign_off(self, why: str) -> None:
        """Publish that this rank has ended. The process that hosts the store ends last, so that the
        others can still ask which rank is missing."""
        self._ended = why
        self._publish_sign()
        end = time.monotonic() + SILENT_S + self._info.grace_s
        while self._status_store.hosted_here and self._info.rank == 0 and time.monotonic() < end:
            if all(sign.ended or rank in self._silent for rank, sign in self._read_signs().items()):
                return
            time.sleep(0.05)


def _keep_signal_for_watchdog(number: int, frame: FrameType | None) -> None:
    """Python writes the signal's number to the pipe only if a handler is set."""
