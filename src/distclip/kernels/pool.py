"""Threads that help a native call: torch's own, or else a small pool, started when first needed.

torch's are better: after a parallel operation, such as the end of a backward pass, they spin for a
while on the cores that a sleeping pool would have to be woken on, and a call of less than a
millisecond would be over by then. They are asked through the OpenMP runtime that torch has loaded,
by the one entry that gcc's compiled code uses; distclip itself neither contains nor links OpenMP.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import torch


class SharedWork(Protocol):
    """One call: `run_share` does a share of it, from any thread; it does nothing where it comes
    late."""

    help_address: int  # of the C function that `run_share` runs, and of its argument
    address: int

    def run_share(self) -> None: ...


class HelperPool:
    """Daemon threads that wait for work. Sleeping they cost nothing; they never keep the
    interpreter alive.

    After a fork the child has none of them, and starts its own. torch's threads are lost to it too,
    and their runtime does not know. A child that imports distclip only after the fork cannot know
    either: it hangs after parallel work of its parent, as torch itself does.
    """

    def __init__(self) -> None:
        self._forget_threads()
        self._forked = False
        os.register_at_fork(after_in_child=self._after_fork)

    def _forget_threads(self) -> None:
        self._work: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._started = 0
        self._starting = threading.Lock()

    def _after_fork(self) -> None:
        self._forget_threads()
        self._forked = True

    def request_help(self, helpers: int, work: SharedWork) -> None:
        """Have up to `helpers` threads besides this one do a share each, now or later; this one may
        do a share before it returns."""
        team = None if self._forked else torchs_threads()
        if team is not None:
            # all of them, even where fewer would do: a smaller team would end the others, and torch
            # would have to start them again
            team(work.help_address, work.address, torch.get_num_threads(), 0)
            return
        if self._started < helpers:
            with self._starting:
                while self._started < helpers:
                    threading.Thread(
                        target=_run_queue, args=(self._work,), name="distclip", daemon=True
                    ).start()
                    self._started += 1
        for _ in range(helpers):
            self._work.put(work.run_share)


def _run_queue(queue: SimpleQueue[Callable[[], object]]) -> None:
    while True:
        queue.get()()


@functools.lru_cache(maxsize=1)
def torchs_threads() -> Callable[[int, int, int, int], None] | None:
    """GOMP_parallel(function, argument, threads, flags) of the runtime that torch brings along, or
    None where it brings none."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    for path in Path(torch.__file__).parent.glob("lib/libgomp*.so*"):
        try:
            parallel = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.restype, parallel.argtypes = (
            None,
            (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint),
        )
        return parallel
    return None


POOL = HelperPool()
