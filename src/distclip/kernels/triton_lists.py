"""Lists of tensors on a CUDA device: one launch measures them, one scales them. Triton is optional,
and imported on use.

What does not depend on the step is prepared once for a list's sizes and dtypes (`KernelPlan`). A
step copies only the addresses to the device, and only where they changed; nothing waits for the
device, and all of it can be captured in a CUDA graph.

Sums of squares: where float64 runs at half of float32's rate it is used for every element (16-bit
numbers are brought to it without a conversion), and however a tensor is cut its sum is right to
1e-15. Elsewhere it may run at 1/64: there float32 is used, with its rounding errors summed beside
it, and float64 for what float32's range does not hold; right to 1e-12. All other sums are float64
from the first element on. Partial sums are added in one order, without atomics, so that a repeated
step gives equal bits.
"""

from __future__ import annotations

import importlib.util
import math
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from distclip.errors import ConfigError
from distclip.kernels.triton_launch import (
    KernelLauncher,
    current_stream,
    is_capturing,
    send_to_device,
)

# the same numbers as in `triton_programs`
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_LISTS = 64  # layouts kept
# compute capabilities whose float64 runs at half of float32's rate
_HALF_RATE = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether triton is installed. Does not import it."""
    return importlib.util.find_spec("triton") is not None


class KernelPlan:
    """The tables of one list of tensors, on their device: which program works on which chunk of
    which tensor.

    Everywhere `pointers` are [n] addresses, 0 where there is no tensor: it counts as 0 and is left
    alone. Nothing waits for the device.

    Args:
        counts: elements of each tensor, which lie without gaps.
        dtypes: of each tensor: float32, float64, bfloat16 or float16.
        device: CUDA; the CPU under triton's interpreter.

    Raises:
        ConfigError: a CUDA graph is being captured, and what the capture needs was not prepared.
    """

    def __init__(
        self, counts: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device
    ) -> None:
        import distclip.kernels.triton_programs as programs

        if is_capturing(device):
            raise ConfigError(_WARM_UP)
        self.device, self.size = device, len(counts)
        self._programs: Any = programs
        count = torch.tensor(counts, dtype=torch.int64, device="cpu")
        chunks = (count + programs.CHUNK - 1) // programs.CHUNK
        firsts = torch.cat([count.new_zeros(1), chunks.cumsum(0)])
        self._chunks = int(firsts[-1])
        self._written = (
            programs.SMALL
            if int(count.sum()) < self._chunks * programs.LARGE[0]
            else programs.LARGE
        )
        codes = [CODES[dtype] for dtype in dtypes]
        self._types = sum({1 << code for code in codes})
        owners = torch.repeat_interleave(
            torch.arange(self.size, dtype=torch.int32, device="cpu"), chunks
        )
        tables = (owners, firsts, count, torch.tensor(codes, dtype=torch.int32, device="cpu"))
        self._tables = [send_to_device(table, device) for table in tables]
        # addresses, the stream, the addresses on the device
        self._sent: tuple[array[int], int, Tensor] | None = None
        self._launcher = KernelLauncher(device)
        self._double = has_fast_float64(device)
        self._ready = _record_event(device)
        # compiled here, since a first launch may come in a capture, where nothing can be loaded
        if device.type == "cuda":
            self.scale_([0] * self.size, 1.0)

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelPlan:
        return self  # tensors come with each call: plans are shared anyhow

    def power_sums(self, pointers: Sequence[int], p: float, out: Tensor | None = None) -> Tensor:
        """Sum |x|^p of each tensor, or max |x| for p = inf: float64 [n] on the device; 0 < p ≤ 8 or
        inf. NaN stays NaN.

        Args:
            out: such a tensor, contiguous, that is filled and returned.
        """
        if out is None:
            out = torch.empty(self.size, dtype=torch.float64, device=self.device)
        partials = torch.empty(self._chunks, dtype=torch.float64, device=self.device)
        programs, constants = self._programs, (self._types, float(p), self._double)
        sizes = (programs.CHUNK, programs.BLOCK, programs.PART)
        self._launch_chunks(
            programs.chunk_sums, programs.WARPS, pointers, (partials,), (*constants, *sizes)
        )
        self._sum_partials(partials, out.view(-1, 1), int(p == math.inf))
        return out

    def clamped_sums(self, pointers: Sequence[int], values: Tensor, p: float) -> Tensor:
        """What a clamp c of each element x would do: float64 [n, 6], as `measure.clamped_sums`.

        Args:
            values: float64 [n] on the device: the bounds.
        """
        partials = torch.zeros(6, self._chunks, dtype=torch.float64, device=self.device)
        out = torch.empty(self.size, 6, dtype=torch.float64, device=self.device)
        programs, args = self._programs, (values, partials, self._chunks)
        constants = (_value_stride(values), self._types, float(p), programs.CHUNK, programs.PART)
        self._launch_chunks(programs.chunk_clamps, programs.WARPS, pointers, args, constants)
        self._sum_partials(partials, out, 2 if p == math.inf else 0)
        return out

    def scale_(self, pointers: Sequence[int], factors: float | Tensor) -> None:
        """Multiply in place, in float32 (float64 tensors in float64), rounded to nearest even.
        Where the factor is 1 nothing is read.

        Args:
            factors: a number, or float64 on any device: 0-dim, or [n], one for each tensor.
        """
        if not isinstance(factors, Tensor):
            factors = torch.full((), factors, dtype=torch.float64, device=self.device)
        self._change_values(pointers, factors, clamp=False)

    def clamp_(self, pointers: Sequence[int], values: Tensor) -> None:
        """Clamp to [-value, value] in place, compared in float32 (float64); NaN stays. Where the
        value is inf nothing is read.

        Args:
            values: float64 on any device: 0-dim, or [n].
        """
        self._change_values(pointers, values, clamp=True)

    def _change_values(self, pointers: Sequence[int], values: Tensor, clamp: bool) -> None:
        values = values.double()  # as a rule they are; a launch does not look
        values = send_to_device(values, self.device) if values.device.type == "cpu" else values
        programs, (written, warps, side_by_side) = self._programs, self._written
        constants = (_value_stride(values), self._types, clamp, programs.CHUNK, written)
        self._launch_chunks(
            programs.change_chunks,
            warps,
            pointers,
            (values, self._chunks),
            constants,
            _num_processors(self.device) * side_by_side,
        )

    def _sum_partials(self, partials: Tensor, out: Tensor, most: int) -> None:
        """Into `out`, [n, rows] float64; the first `most` rows are maxima."""
        args = (partials, self._tables[1], out, self._chunks)
        self._launcher.run(
            self._programs.tensor_sums,
            self._programs.WARPS,
            (self.size, out.shape[1]),
            args,
            (most, self._programs.LANES),
        )

    def _launch_chunks(
        self,
        program: Any,
        warps: int,
        pointers: Sequence[int],
        args: tuple[Any, ...],
        constants: tuple[Any, ...],
        most: int | None = None,
    ) -> None:
        """A program for each chunk, or `most` at most."""
        addresses, chunks = self._device_addresses(pointers), self._chunks
        if chunks:
            grid = (chunks if most is None else min(chunks, most), 1)
            self._launcher.run(program, warps, grid, (addresses, *self._tables, *args), constants)

    def _device_addresses(self, pointers: Sequence[int]) -> Tensor:
        """[n] int64: the addresses on the device. Copied only where they changed.

        A captured graph keeps what it reads: the addresses copied before the capture, where
        gradients did not move, else a pinned copy of its own, from which every replay copies them.
        """
        addresses = pointers if isinstance(pointers, array) else array("Q", pointers)
        known = self._sent
        if is_capturing(self.device):
            if known is not None and known[0] == addresses:
                _GRAPHS.append((self, known))
                return known[2]
            host = _RESERVE.take_words(self.size)
            host.copy_(_as_int64(addresses))
            _GRAPHS.append((self, host))
            return host.to(self.device, non_blocking=True)
        stream = current_stream(self.device)
        if known is not None and known[0] == addresses and known[1] == stream:
            return known[2]
        if self.device.type == "cuda":
            _RESERVE.ensure_room(self.size)
            self._follow_stream()
        addresses = addresses[:]  # the caller's may change
        sent = send_to_device(_as_int64(addresses), self.device)
        self._sent = (addresses, stream, sent)
        return sent

    def _follow_stream(self) -> None:
        """The tables may have been copied on another stream than the current one."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self._ready)
        for table in self._tables:
            table.record_stream(stream)


@lru_cache(maxsize=_LISTS)
def plan_for(
    counts: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> KernelPlan:
    """Prepared once for each list of sizes and dtypes."""
    return KernelPlan(counts, dtypes, device)


_WARM_UP = (
    "a CUDA graph is being captured, and what the capture needs was not prepared; run the step "
    "without capture first, on the same "
    "parameters (warm up, as torch's recipe for CUDA graphs does), once before each capture"
)


class _PinnedReserve:
    """Pinned memory for the addresses that captured graphs copy. Allocated before the capture, in
    which none can be; never reused."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.int64, device="cpu")

    def ensure_room(self, words: int) -> None:
        """Make room for several captures of a list."""
        if self._free.numel() < 4 * words:
            self._free = torch.empty(
                max(16 * words, 1 << 14), dtype=torch.int64, device="cpu", pin_memory=True
            )

    def take_words(self, words: int) -> Tensor:
        if self._free.numel() < words:
            raise ConfigError(_WARM_UP)
        taken, self._free = self._free[:words], self._free[words:]
        return taken


_RESERVE = _PinnedReserve()
_GRAPHS: list[Any] = []  # what captured graphs read; a graph may live as long as the program


def has_fast_float64(device: torch.device) -> bool:
    """Whether `device` computes in float64 at half of float32's rate."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) in _HALF_RATE


@lru_cache(maxsize=_LISTS)
def _num_processors(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )


def _as_int64(addresses: array[int]) -> Tensor:
    """[n] int64, in the same memory."""
    return (
        torch.frombuffer(addresses, dtype=torch.int64)
        if addresses
        else torch.empty(0, dtype=torch.int64, device="cpu")
    )


def _value_stride(values: Tensor) -> int:
    """From one tensor's value to the next: 0 where all share one, or an expanded one."""
    return values.stride(0) if values.ndim else 0


def _record_event(device: torch.device) -> Any:
    """An event after all copies so far."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
