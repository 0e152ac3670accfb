"""A threshold at a percentile of the norms so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distclip.errors import ConfigError
from distclip.passed import as_number
from distclip.policies.fixed import clip_coefficient
from distclip.records import Norms, Scale


class AutoClipState(NamedTuple):
    # [groups, window] float64: the latest norms, a ring buffer; 0 where there is none yet
    history: Tensor
    seen: Tensor  # [groups] int64: norms taken in so far


@dataclass(frozen=True)
class AutoClip:
    """g ← g · c / max(|g|, c), where c is the p-th percentile of the norms so far, this step's
    among them.

    Seetharaman, Wichern, Pardo, Le Roux 2020 (arXiv:2007.14469), algorithm 1: G_h(t) =
    G_h(t-1).append(|g_t|), η_c(t) = percentile p of G_h(t), interpolated linearly; p = 10 did best
    in the paper. It clips about 90 % of all steps. The paper keeps all norms; here the latest
    `window` are kept.

    Tracks the raw norm and sends nothing. The first step is not clipped. A norm of 0 (a group
    without gradients at this step) is not taken in: it would pull the threshold to 0.

    Args:
        percentile: p, from 0 (the smallest norm so far) to 100 (the largest: clips nothing but what
            falls out of the window).
        window: how many norms a group keeps, at 8 bytes each; they are sorted at every step. With
            thousands of groups take fewer.

    Raises:
        ConfigError: `percentile` outside [0, 100], or `window` that is not a positive whole number.
    """

    percentile: float = 10.0
    window: int = 1000

    def __post_init__(self) -> None:
        if not 0 <= as_number(self.percentile) <= 100:
            raise ConfigError(
                f"AutoClip: percentile={self.percentile!r} must be from 0 to 100; "
                f"the paper takes 10"
            )
        if not isinstance(self.window, int) or self.window < 1:
            raise ConfigError(
                f"AutoClip: window={self.window!r} must be a whole number of at "
                f"least 1; it counts the norms that are kept"
            )

    def init(self, groups: int, device: torch.device) -> AutoClipState:
        history = torch.zeros(groups, self.window, dtype=torch.float64, device=device)
        return AutoClipState(history, torch.zeros(groups, dtype=torch.int64, device=device))

    def decide(self, norms: Norms, state: tuple[Tensor, ...]) -> tuple[Scale, AutoClipState]:
        history, seen = state
        norm = norms.per_group
        taken = norms.finite & norm.isfinite() & (norm > 0)
        place = torch.arange(self.window, device=norm.device)
        here = (place == (seen % self.window).unsqueeze(1)) & taken.unsqueeze(1)
        history, seen = torch.where(here, norm.unsqueeze(1), history), seen + taken
        threshold = _percentile_of(
            history, seen.clamp(max=self.window), self.percentile / 100, place
        )
        return Scale(clip_coefficient(norm, threshold), threshold), AutoClipState(history, seen)


def _percentile_of(history: Tensor, filled: Tensor, fraction: float, place: Tensor) -> Tensor:
    """The percentile of the first `filled` entries of each row: [groups], inf where there is
    none."""
    ordered = history.masked_fill(place >= filled.unsqueeze(1), math.inf).sort(dim=1).values
    rank = (filled - 1).clamp(min=0).double() * fraction
    below = rank.long()
    low = ordered.gather(1, below.unsqueeze(1)).squeeze(1)
    high = ordered.gather(1, (below + 1).clamp(max=history.shape[1] - 1).unsqueeze(1)).squeeze(1)
    part = rank - below
    return torch.where(part > 0, low + (high - low) * part, low)
