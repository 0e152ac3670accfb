"""Starting Triton's programs on one device, compiled once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor


class KernelLauncher:
    """Starts programs, and keeps what each was compiled to. Nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._runners: dict[tuple[object, ...], Any] = {}  # ready to be launched

    def run(
        self,
        program: Any,
        warps: int,
        grid: tuple[int, int],
        args: tuple[Any, ...],
        constants: tuple[Any, ...],
    ) -> None:
        """Triton specializes on the arguments of the first launch only: all later ones have the
        same types, and alignment where the program is specialized on it.

        Args:
            args: tensors and whole numbers, in the program's order; `constants` follow them.
        """
        with on_device(self.device):
            key = (program.__name__, warps, grid, *constants)
            runner = self._runners.get(key)
            if runner is not None:
                runner(*args, *constants, stream=current_stream(self.device))
                return
            # products and sums stay apart: their rounding is part of the result
            compiled = program[grid](*args, *constants, num_warps=warps, enable_fp_fusion=False)
            if compiled is not None:  # as it is under the interpreter
                self._runners[key] = compiled[(*grid, 1)]


@cache
def launcher_for(device: torch.device) -> KernelLauncher:
    """One for each device, of programs whose constants are few."""
    return KernelLauncher(device)


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def send_to_device(table: Tensor, device: torch.device) -> Tensor:
    """A copy on the device. torch's allocator does not reuse the pinned memory before the copy is
    done, so nothing waits for it."""
    if device.type != "cuda":
        return table
    with on_device(device):  # pinned memory belongs to the current one
        return table.pin_memory().to(device, non_blocking=True)
