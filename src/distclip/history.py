"""Stage 6c: how often the last steps were clipped, and how many were left out. Pure; equal on every rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WINDOW = 500  # steps


class History(NamedTuple):
    """State like a policy's."""

    clipped: Tensor  # [WINDOW] bool, written round and round
    calls: Tensor  # [] int64
    skips: Tensor  # [] int64: steps not taken

    @property
    def rate(self) -> Tensor:
        """[] float64: share of the last steps, up to WINDOW, that were clipped; 0 before the first."""
        return self.clipped.sum() / self.calls.clamp(min=1, max=WINDOW).double()


def empty(device: torch.device) -> History:
    calls = torch.zeros((), dtype=torch.int64, device=device)
    return History(torch.zeros(WINDOW, dtype=torch.bool, device=device), calls, calls.clone())


def recorded(history: History, clipped: Tensor, skipped: Tensor) -> History:
    """With one more step. `clipped`, `skipped`: [] bool. No host sync."""
    place = (history.calls % WINDOW).reshape(1)
    return History(history.clipped.index_copy(0, place, clipped.reshape(1)), history.calls + 1, history.skips + skipped)
