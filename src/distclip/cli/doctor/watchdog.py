"""The watch: a thread that ends this process, and says which ranks are missing, when a stage does
not end."""

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
SILENT_S = 2.5  # a rank whose beat stands still that long gives no sign of life
MEETS = 1000  # the step of every meeting: ranks may take fewer to it, where they raised
ASK_S = 5.0  # a store that does not answer questions for that long is gone


@dataclass(frozen=True, slots=True)
class Sign:
    """A rank's last sign of life."""

    beat: int
    stage: list[int]  # the how manieth meeting it goes to, and the step on the way there
    text: str
    host: str
    ended: str  # empty while it runs


class Watchdog:
    """Beats on the board while it is open; `with Watch(...) as watch`.

    Args:
        on_lost: called with the text before the process ends with exit code 2; only on rank 0, to
            show what is known by then.
    """

    def __init__(self, board: StatusStore, on_lost: Callable[[str], None]) -> None:
        self._board, self._place, self._on_lost = board, board.place, on_lost
        self._beats, self._asks = board.twin(), board.twin()
        # of the ending: the main thread's or the watch's, whoever comes first
        self._lock = threading.Lock()
        self._beat, self._stage, self._text, self._until = (
            0,
            [0, 0],
            "start",
            time.monotonic() + self._place.timeout_s,
        )
        self._reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        self._concluded, self._closed, self._ended = False, False, ""
        self._silent = set[int]()  # ranks that give no sign of life
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watchdog:
        # torchrun ends the others by SIGTERM when a rank dies. The main thread may be inside a
        # collective and never run a handler: the signal's number is written to the pipe in any
        # case, and the watch reads it.
        self._before = (
            signal.signal(signal.SIGTERM, _leave_to_the_watch),
            signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False),
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
        os.write(self._writes, b"\0")
        self._thread.join()
        signal.set_wakeup_fd(self._before[1])
        signal.signal(signal.SIGTERM, self._before[0])
        os.close(self._reads)
        os.close(self._writes)

    @property
    def where(self) -> str:
        """The stage in which this rank is."""
        return self._text

    def stage(self, text: str) -> None:
        """From here on this rank is in `text`, for at most the time-out and some grace."""
        meeting, step = self._stage
        self._enter(
            [meeting + 1, 0] if step == MEETS else [meeting, step + 1], text, self._place.timeout_s
        )

    def meet(self, text: str, wait_s: float) -> None:
        """From here on this rank waits for all others, for at most `wait_s` seconds and some grace.
        Every rank comes to every meeting."""
        meeting, step = self._stage
        self._enter([meeting + (step == MEETS), MEETS], text, wait_s)

    def conclude(self) -> None:
        """Everything was said: from here on a SIGTERM only means that other ranks have ended
        already."""
        self._concluded = True

    def _enter(self, stage: list[int], text: str, wait_s: float) -> None:
        self._stage, self._text, self._until = stage, text, time.monotonic() + wait_s
        self._sign()

    def end(self, what: str) -> NoReturn:
        """Say what happened and which ranks did not answer, and end the process with code 2."""
        with self._lock:  # never released: the other thread must not end the process in the middle
            missing = self._ask()
            text = f"rank {self._place.rank} on {self._place.host}: {what}. {missing}"
            print(f"distclip doctor: {text}", file=sys.stderr, flush=True)
            if self._place.rank == 0:
                self._on_lost(text)
            self.leave(2, "lost")

    def leave(self, code: int, why: str = "done") -> NoReturn:
        """End the process at once, without the interpreter's own ending, in which a broken process
        group may hang."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.part(why)
        os._exit(code)

    def _look(self) -> None:
        while True:
            woken = select.select([self._reads], [], [], BEAT_S)[0]
            if self._closed:
                return
            if woken and signal.SIGTERM in os.read(self._reads, 64) and not self._concluded:
                self.end(
                    f"ended by SIGTERM in '{self._text}', which launchers send when a rank has died"
                )
            self._sign()
            if time.monotonic() > self._until + self._place.grace_s:
                met = self._stage[1] == MEETS
                self.end(
                    f"after '{self._text}' no word came"
                    if met
                    else f"'{self._text}' did not end within {self._place.timeout_s:g} s"
                )

    def _sign(self) -> None:
        self._beat += 1
        sign = [self._beat, self._stage, self._text, self._place.host, self._ended]
        try:
            self._beats.set(f"beat/{self._place.rank}", json.dumps(sign))
        except (dist.DistError, RuntimeError):
            return  # the store is gone: `end` says so, when a stage does not end for it

    def _ask(self) -> str:
        """The missing ranks, in words. In a thread: a store whose process was stopped answers
        nothing, and has no time-out."""
        told: list[str] = []

        def ask() -> None:
            try:
                first = self._signs()
                until = time.monotonic() + SILENT_S
                # the watch's thread may be the one that waits for this: others must not miss its
                # beat
                while time.monotonic() < until:
                    time.sleep(BEAT_S / 2)
                    self._sign()
                told.append(self._missing(first, self._signs()))
            except (dist.DistError, RuntimeError) as error:
                told.append(
                    f"The store at {self._board.where} is gone "
                    f"({str(error).splitlines()[0]})" + self._host_of_store()
                )

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(ASK_S)
        return (
            told[0]
            if told
            else f"The store at {self._board.where} does not answer" + self._host_of_store()
        )

    def _host_of_store(self) -> str:
        if self._board.hosted and self._place.rank != 0:
            return (
                ", and rank 0 holds it: did not answer: rank 0 (lost, stopped, or it ended "
                "first: see its output)"
            )
        return ": the launcher's agent on the first node holds it; see its output"

    def _signs(self) -> dict[int, Sign]:
        """rank → its last sign, of those that ever gave one. In few questions: thousands of ranks
        may ask at once."""
        self._asks.set_timeout(timedelta(seconds=ASK_S))
        ranks = list(range(self._place.size))
        if not self._asks.check([f"beat/{rank}" for rank in ranks]):
            ranks = [rank for rank in ranks if self._asks.check([f"beat/{rank}"])]
        told = self._asks.multi_get([f"beat/{rank}" for rank in ranks])
        return {rank: Sign(*json.loads(text)) for rank, text in zip(ranks, told, strict=True)}

    def _missing(self, first: dict[int, Sign], last: dict[int, Sign]) -> str:
        dead: list[str] = []
        elsewhere: list[str] = []
        for rank in range(self._place.size):
            before, sign = first.get(rank), last.get(rank)
            if rank == self._place.rank:
                continue
            if sign is None:
                self._silent.add(rank)
                dead.append(f"rank {rank} (it never started, or cannot reach {self._board.where})")
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
        if self._place.size == 1:
            return "Nothing else runs here: run with a larger --timeout"
        return (
            "Every other rank is alive and waits in the same place: the network between them does "
            "not carry this; see GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO, and "
            "firewalls"
        )

    def part(self, why: str) -> None:
        """Say that this rank has ended. The holder of the store leaves last, so that the others can
        still ask who is missing."""
        self._ended = why
        self._sign()
        end = time.monotonic() + SILENT_S + self._place.grace_s
        while self._board.hosted and self._place.rank == 0 and time.monotonic() < end:
            if all(sign.ended or rank in self._silent for rank, sign in self._signs().items()):
                return
            time.sleep(0.05)


def _leave_to_the_watch(number: int, frame: FrameType | None) -> None:
    """A handler must be set for the number to be written to the pipe."""
