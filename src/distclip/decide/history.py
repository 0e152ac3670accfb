"""Stage 6c: how often the last steps were clipped, and how many were left out. Equal on every
rank."""

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
        """[] float64: share of the last steps, up to WINDOW, that were clipped; 0 before the
        first."""
        return self.clipped.sum(dtype=torch.float64) / self.calls.clamp(min=1, max=WINDOW)

    def record_(self, clipped: Tensor, skipped: Tensor) -> Tensor:
        """One more step, in place: a captured graph's replays find there what the one before left.
        The rate with it. No host sync.

        Args:
            clipped, skipped: [] bool.
        """
        self.clipped.index_copy_(0, (self.calls % WINDOW).reshape(1), clipped.reshape(1))
        self.calls.add_(1)
        self.skips.add_(skipped)
        return self.rate

    def record_here_(self, clipped: bool, skipped: bool) -> float:
        """The same where reading costs nothing, by fewer operations."""
        calls = int(self.calls)
        place = self.clipped[calls % WINDOW]
        if bool(place) != clipped:
            place.fill_(clipped)
        self.calls.fill_(calls + 1)
        if skipped:
            self.skips.add_(1)
        return int(self.clipped.count_nonzero()) / min(calls + 1, WINDOW)


def empty(device: torch.device) -> History:
    calls = torch.zeros((), dtype=torch.int64, device=device)
    return History(torch.zeros(WINDOW, dtype=torch.bool, device=device), calls, calls.clone())
