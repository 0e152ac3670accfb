"""The only reader of device values: now, or exactly one call late through a ring of two pinned
copies."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Late(Generic[T]):  # a NamedTuple cannot be generic in Python 3.10
    """What the previous call left to be judged."""

    numbers: list[float]
    what: T


class Readback(Generic[T]):
    """Host copies of one vector a call.

    A call either reads its own vector (`now`, on CUDA a synchronisation) or leaves it and takes the
    previous one (`leave`, `taken`). Copies are counted by calls and never polled, so that all ranks
    see the same vector at the same call.
    """

    def __init__(self) -> None:
        self._ring: list[Tensor] = []
        self._turn = 0
        self._left: tuple[Tensor, Any, T] | None = None

    @staticmethod
    def now(*tensors: Tensor) -> list[list[float]]:
        """The numbers of each tensor. On CUDA this waits for the device, once."""
        if tensors[0].device.type == "cpu":
            return [tensor.tolist() if tensor.ndim else [float(tensor)] for tensor in tensors]
        numbers = iter(torch.cat([tensor.reshape(-1).double() for tensor in tensors]).tolist())
        return [list(islice(numbers, tensor.numel())) for tensor in tensors]

    def leave(self, vector: Tensor, what: T) -> None:
        """Start the copy of this call's vector; `taken` gives it at the next call."""
        if vector.device.type != "cuda":
            self._left = (vector.clone(), None, what)
            return
        if not self._ring or self._ring[0].numel() != vector.numel():
            self._ring = [
                torch.empty(vector.numel(), dtype=vector.dtype, device="cpu", pin_memory=True)
                for _ in range(2)
            ]
        copy = self._ring[self._turn]
        self._turn = 1 - self._turn
        copy.copy_(vector, non_blocking=True)
        # which need not be the current device's
        done = torch.cuda.current_stream(vector.device).record_event()
        self._left = (copy, done, what)

    def taken(self) -> Late[T] | None:
        """The previous call's vector, once; waits for its copy alone, not for the device."""
        if self._left is None:
            return None
        copy, done, what = self._left
        self._left = None
        if done is not None:
            done.synchronize()
        return Late(copy.tolist(), what)
