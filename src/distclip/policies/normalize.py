"""Every step of one length."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distclip.policies.fixed import checked_threshold
from distclip.records import Norms, Scale


@dataclass(frozen=True)
class Normalize:
    """g ← g · c / |g|: small gradients are lengthened too; 1 where |g| = 0.

    Normalised gradient descent, as in Hazan, Levy, Shalev-Shwartz 2015 (arXiv:1507.02030),
    algorithm 1.

    Args:
        norm: c, the length that every group's gradient gets.
        allow_zero: accept 0, which zeroes every gradient.

    Raises:
        ConfigError: negative, NaN, or zero without `allow_zero`.
    """

    norm: float
    allow_zero: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        checked_threshold("norm", self.norm, self.allow_zero)

    def init(self, groups: int, device: torch.device) -> tuple[Tensor, ...]:
        return ()

    def decide(self, norms: Norms, state: tuple[Tensor, ...]) -> tuple[Scale, tuple[Tensor, ...]]:
        target = torch.full_like(norms.per_group, self.norm)
        coef = torch.where(norms.per_group > 0, target / norms.per_group, torch.ones_like(target))
        return Scale(coef, target), state
