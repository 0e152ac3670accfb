"""Optional fast paths; plain torch operations are the reference."""

from __future__ import annotations

from array import array
from typing import Protocol

import torch
from torch import Tensor


class Layout(Protocol):
    """A list of tensors of known sizes and dtypes, prepared once; pointers change from step to step (0: no tensor)."""

    def power_sums(self, pointers: array[int], p: float) -> Tensor: ...
    def clamped_sums(self, pointers: array[int], values: Tensor, p: float) -> Tensor: ...
    def scale_(self, pointers: array[int], factors: float | Tensor) -> None: ...
    def clamp_(self, pointers: array[int], values: Tensor) -> None: ...


def layout(counts: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device) -> Layout | None:
    """None: torch serves."""
    return None
