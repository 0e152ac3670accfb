"""Interleaved timing, and how fast this machine reads memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from benchmarks.records import Spread


@dataclass(frozen=True, slots=True)
class Contender:
    """`run` is timed; `before` (gradients restored) and `after` (a scaler reset) are not."""

    name: str
    run: Callable[[], object]
    before: Callable[[], object] | None = None
    after: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class Effort:
    """How long a comparison may take."""

    seconds: float = 2.0
    least: int = 8  # rounds, unless they take five times as long
    most: int = 400
    quick: bool = False


QUICK = Effort(seconds=0.2, least=3, most=20, quick=True)


def one(contender: Contender) -> float:
    if contender.before is not None:
        contender.before()
    start = time.perf_counter()
    contender.run()
    seconds = time.perf_counter() - start
    if contender.after is not None:
        contender.after()
    return seconds


@contextmanager
def quiet():
    """No garbage collection inside a timed section, for peers and distclip alike."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def interleaved(contenders: Sequence[Contender], effort: Effort) -> dict[str, list[float]]:
    """Seconds by contender, round by round: A B C, C B A, A B C, … so that each follows each as
    often."""
    with quiet():
        for contender in contenders:
            one(contender)  # caches and lazily made state
        times: dict[str, list[float]] = {c.name: [] for c in contenders}
        start, rounds = time.perf_counter(), 0
        while rounds < effort.most:
            spent = (time.perf_counter() - start) / effort.seconds
            if rounds >= 3 and spent >= (1 if rounds >= effort.least else 5):
                break
            for contender in contenders if rounds % 2 == 0 else reversed(contenders):
                times[contender.name].append(one(contender))
            rounds += 1
    return times


def ratios(times: dict[str, list[float]], peer: str, ours: str) -> Spread:
    """peer / ours of the same round."""
    return Spread.of([a / b for a, b in zip(times[peer], times[ours], strict=True)])


def reader(megabytes: int) -> tuple[Callable[[], object], int]:
    """The fastest way found here to read a float32 buffer once with torch's threads, and the
    buffer's bytes."""
    buffer = torch.ones(megabytes << 18)
    candidates: list[Callable[[], object]] = [
        buffer.sum,
        buffer.amax,
        lambda: torch.linalg.vector_norm(buffer.view(-1, 4096), 2, dim=1),
        lambda: buffer.view(-1, 4096).sum(1),
        lambda: buffer.view(-1, 65536).amax(1),
    ]
    times = interleaved(
        [Contender(str(i), run) for i, run in enumerate(candidates)], Effort(seconds=0.3, least=3)
    )
    best = min(times, key=lambda name: Spread.of(times[name]).median)
    return candidates[int(best)], buffer.numel() * buffer.element_size()


def read_bandwidth(quick: bool) -> Spread:
    """GB/s, with torch's current number of threads."""
    run, size = reader(16 if quick else 256)
    times = interleaved([Contender("read", run)], QUICK if quick else Effort(seconds=0.5))["read"]
    return Spread.of([size / seconds / 1e9 for seconds in times])
