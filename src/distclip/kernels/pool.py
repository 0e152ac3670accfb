"""Threads that help a native call: started when first needed, none where torch itself has one thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue


class Pool:
    """Daemon threads that wait for work. Sleeping they cost nothing; they never keep the interpreter alive.

    After a fork the child has none of them, and starts its own.
    """

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._work: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._started = 0
        self._starting = threading.Lock()

    def ask(self, helpers: int, work: Callable[[], object]) -> None:
        """Have up to `helpers` threads run `work`, some time; returns at once. `work` must be harmless when it comes late."""
        if self._started < helpers:
            with self._starting:
                while self._started < helpers:
                    threading.Thread(target=_serve, args=(self._work,), name="distclip", daemon=True).start()
                    self._started += 1
        for _ in range(helpers):
            self._work.put(work)


def _serve(queue: SimpleQueue[Callable[[], object]]) -> None:
    while True:
        queue.get()()


POOL = Pool()
