"""The only reader of a step's device values: now, or exactly one call late through a ring of two
pinned copies. And numbers of the host, which are read as they are.

Set-up, failure paths (`decide.audit`) and reports that a caller reads have reads of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from distclip.values import Flag, Number

T = TypeVar("T")


class HostVector:
    """Python's numbers and a tensor over the same memory, written anew at each call.

    Attributes:
        tensor: [size] float64 on the CPU.
    """

    def __init__(self, size: int) -> None:
        self._codec = Struct(f"{size}d")
        self._bytes = bytearray(self._codec.size)
        self.tensor = torch.frombuffer(self._bytes, dtype=torch.float64)

    def __reduce__(self) -> tuple[type[HostVector], tuple[int]]:
        """A copy has memory of its own."""
        return HostVector, (self.tensor.numel(),)

    def write(self, numbers: Sequence[float]) -> None:
        """As many numbers as it holds."""
        self._codec.pack_into(self._bytes, 0, *numbers)

    def read(self) -> list[float]:
        return list(self._codec.unpack(self._bytes))


# Of numbers that some call packed: those of the host, None where the vector has them.
KnownNumbers: TypeAlias = "list[float | None]"
NOTHING_KNOWN: KnownNumbers = []  # the vector has all of them


def pack_numbers(
    numbers: Sequence[Number], flags: Sequence[Flag], columns: Sequence[Tensor]
) -> tuple[Tensor, KnownNumbers]:
    """One float64 vector of all that is on the device: what the host knows is not sent there to be
    read again. `fill_in` puts both in this order.

    Args:
        flags: of which one at least is on the device.
    """
    known = [None if isinstance(n, Tensor) else float(n) for n in (*numbers, *flags)]
    parts = [number.reshape(1) for number in numbers if isinstance(number, Tensor)]
    told = torch.stack([flag for flag in flags if isinstance(flag, Tensor)])
    return torch.cat([*parts, told.double(), *columns]), known


def fill_in(known: KnownNumbers, read: Sequence[float]) -> list[float]:
    """All that was packed, of the vector's numbers."""
    there = iter(read)
    return [next(there) if number is None else number for number in known] + list(there)


class Readback(Generic[T]):
    """Host copies of one vector a call.

    A call either reads its own vector (`read_now`, on CUDA a synchronisation) or leaves it and
    takes the previous one (`enqueue`, `dequeue`). Copies are counted by calls and never polled, so
    that all ranks see the same vector at the same call.
    """

    def __init__(self) -> None:
        self._ring: list[Tensor] = []
        self._turn = 0
        self._left: tuple[Tensor, Any, T] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has nothing to judge: what is left here is judged here."""
        return Readback, ()

    @staticmethod
    def read_now(vector: Tensor) -> list[float]:
        """Its numbers. On CUDA this waits for the device, once."""
        return vector.tolist()

    def enqueue(self, vector: Tensor, what: T) -> None:
        """Start the copy of this call's vector; `dequeue` gives it at the next call."""
        if vector.device.type != "cuda":
            self._left = (vector.clone(), None, what)
            return
        size, dtype = vector.numel(), vector.dtype
        if not self._ring or self._ring[0].numel() < size:
            self._ring = [
                torch.empty(size, dtype=dtype, device="cpu", pin_memory=True) for _ in range(2)
            ]
        copy = self._ring[self._turn][:size]
        self._turn = 1 - self._turn
        copy.copy_(vector, non_blocking=True)
        # the vector's device need not be the current one
        done = torch.cuda.current_stream(vector.device).record_event()
        self._left = (copy, done, what)

    def dequeue(self) -> tuple[list[float], T] | None:
        """The previous call's numbers and what was left with them, once; waits for their copy
        alone, not for the device."""
        if self._left is None:
            return None
        copy, done, what = self._left
        self._left = None
        if done is not None:
            done.synchronize()
        return copy.tolist(), what
