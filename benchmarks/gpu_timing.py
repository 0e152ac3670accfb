"""Times on a CUDA device: interleaved, with events; what the host does for a call; launches, waits
and memory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.records import Spread
from benchmarks.timing import Contender, Effort, quiet

# of the device's clock in a second, roughly: how long it is kept busy while the host prepares a
# call
_TICKS = 2e9


@dataclass(slots=True)
class Times:
    """Seconds, by round."""

    # on an idle device, from the call to the end of its last kernel
    whole: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)  # until the call returns
    # the kernels alone: the host was ahead of the device
    device: list[float] = field(default_factory=list)


class Cache:
    """Memory that is written between two runs, so that no cache serves."""

    def __init__(self) -> None:
        size = 2 * getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
        self._memory = torch.empty(size, dtype=torch.uint8, device="cuda")

    def flush(self) -> None:
        self._memory.fill_(1)


def _once(contender: Contender, cache: Cache, busy: float) -> tuple[float, float]:
    """Seconds between two events around the call, and of the host. The device is kept busy before
    it for `busy` seconds."""
    if contender.before is not None:
        contender.before()
    cache.flush()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if busy:
        torch.cuda._sleep(int(busy * _TICKS))
    start.record()
    began = time.perf_counter()
    contender.run()
    host = time.perf_counter() - began
    end.record()
    torch.cuda.synchronize()
    if contender.after is not None:
        contender.after()
    return start.elapsed_time(end) / 1e3, host


def interleaved(contenders: Sequence[Contender], effort: Effort, cache: Cache) -> dict[str, Times]:
    """A B C, C B A, A B C, … each once on an idle device and once on a busy one in a round."""
    times = {contender.name: Times() for contender in contenders}
    with quiet():
        for contender in contenders:
            for _ in range(2):
                # compiled kernels, lazily made state, the allocator's blocks
                _once(contender, cache, 0.0)
        began, rounds = time.perf_counter(), 0
        while rounds < effort.most:
            spent = (time.perf_counter() - began) / effort.seconds
            if rounds >= 3 and spent >= (1 if rounds >= effort.least else 3):
                break
            for contender in contenders if rounds % 2 == 0 else reversed(contenders):
                mine = times[contender.name]
                whole, host = _once(contender, cache, 0.0)
                mine.whole.append(whole)
                mine.host.append(host)
                mine.device.append(_once(contender, cache, min(0.2, 2 * host + 1e-4))[0])
            rounds += 1
    return times


@dataclass(frozen=True, slots=True)
class Counts:
    """What one call is made of, after it has been called before."""

    launches: int  # kernels, copies and fills
    waits: int  # operations for which the host waits for the device
    extra: int  # bytes beyond what was allocated before, at most


def counts(run: Callable[[], object], before: Callable[[], object] | None = None) -> Counts:
    for _ in range(3):
        _prepared(before)
        run()
    _prepared(before)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing" in str(one.message) for one in said)
    _prepared(before)
    torch.cuda.reset_peak_memory_stats()
    had = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - had
    _prepared(before)
    with torch.profiler.profile(
        activities=list(torch.profiler.supported_activities()), acc_events=True
    ) as profile:
        run()
        torch.cuda.synchronize()
    launches = sum(
        event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events() or ()
    )
    return Counts(launches, waits, extra)


def _prepared(before: Callable[[], object] | None) -> None:
    if before is not None:
        before()
    torch.cuda.synchronize()


def bandwidths(effort: Effort, cache: Cache) -> tuple[Spread, Spread]:
    """GB/s: reading; reading and writing, both counted. The fastest way found here for each."""
    count = (1 << 24 if effort.quick else 1 << 29) // 65536 * 65536
    values = torch.randn(count, device="cuda")
    size = values.numel() * values.element_size() / 1e9
    reads: list[Callable[[], object]] = [values.sum, values.amax]
    if find_spec("triton") is not None:
        from benchmarks.gpu_read import reader

        reads.append(reader(values))
    other = torch.empty_like(values)
    both: list[Callable[[], object]] = [lambda: other.copy_(values), lambda: values.mul_(1.0)]
    runs = {f"read {i}": run for i, run in enumerate(reads)} | {
        f"both {i}": run for i, run in enumerate(both)
    }
    times = interleaved([Contender(name, run) for name, run in runs.items()], effort, cache)

    def best(kind: str, factor: int) -> Spread:
        found = [
            Spread.of([factor * size / seconds for seconds in t.device])
            for name, t in times.items()
            if name.startswith(kind)
        ]
        return max(found, key=lambda spread: spread.median)

    return best("read", 1), best("both", 2)


@contextmanager
def freed():
    """What a case allocated goes back to the device."""
    try:
        yield
    finally:
        import gc

        gc.collect()
        torch.cuda.empty_cache()


def machine(effort: Effort, cache: Cache) -> dict[str, Any]:
    device = torch.cuda.get_device_properties(0)
    read, both = bandwidths(effort, cache)
    triton = "none"
    if find_spec("triton") is not None:
        import triton as module

        triton = module.__version__
    return {
        "device": device.name,
        "processors": device.multi_processor_count,
        "memory_gib": device.total_memory >> 30,
        "capability": f"{device.major}.{device.minor}",
        "torch": torch.__version__,
        "triton": triton,
        "read_gb_s": [read.median, read.q1, read.q3],
        "read_write_gb_s": [both.median, both.q1, both.q3],
    }
