"""A threshold relative to a running mean of the norm of each group."""

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


class AdaGCState(NamedTuple):
    gamma: Tensor  # [groups] float64: γ, 0 before the first norm
    seen: Tensor  # [groups] int64: norms taken in so far


@dataclass(frozen=True)
class AdaGC:
    """g_i ← g_i · h_i with h_i = min(1, λ_rel · γ_i / |g_i|), then γ_i ← β γ_i + (1-β) |h_i g_i|,
    for each group i.

    Wang, Li, Chen, Zeng, Yang, Yu, Ma, Shen 2025 (arXiv:2502.11034), algorithm 1. In the warm-up
    all groups are scaled by one h = min(1, λ_abs / |g|), with |g| the total norm, and γ_i is the
    smallest |h g_i| so far. The paper has one group a tensor: use it with
    `groups=distclip.per_parameter()`.

    Tracks the clipped norm and sends nothing. A norm of 0 (a group without gradients at this step)
    is not taken in, nor counted as warm-up: it would hold γ at 0, and the group would never move
    again. The reported threshold in the warm-up, λ_abs, is one of the total norm.

    Args:
        lambda_rel: λ_rel, how far above its running mean a group's norm may be; 1.04 in the
            authors' code (1.05 in early versions).
        lambda_abs: λ_abs, threshold of the total norm in the warm-up; 1.0 in the paper; `math.inf`
            only measures.
        beta: β, how much of γ is kept a step; 0.99 in the authors' code (0.98 in early versions).
        warmup: T_start, how many norms of a group are its warm-up; 100 in the paper.

    Raises:
        ConfigError: an argument out of range.
    """

    lambda_rel: float = 1.04
    lambda_abs: float = 1.0
    beta: float = 0.99
    warmup: int = 100

    def __post_init__(self) -> None:
        if not 1 <= as_number(self.lambda_rel) < math.inf:
            raise ConfigError(
                f"AdaGC: lambda_rel={self.lambda_rel!r} must be at least 1 and finite, or every "
                f"norm shrinks to 0; 1.04 is usual"
            )
        if not as_number(self.lambda_abs) > 0:
            raise ConfigError(
                f"AdaGC: lambda_abs={self.lambda_abs!r} must be positive (math.inf "
                f"only measures in the warm-up)"
            )
        if not 0 <= as_number(self.beta) < 1:
            raise ConfigError(
                f"AdaGC: beta={self.beta!r} must be at least 0 and below 1; 0.99 is usual"
            )
        if not isinstance(self.warmup, int) or self.warmup < 1:
            raise ConfigError(
                f"AdaGC: warmup={self.warmup!r} must be a whole number of at least "
                f"1; the first norm starts γ"
            )

    def init(self, groups: int, device: torch.device) -> AdaGCState:
        gamma = torch.zeros(groups, dtype=torch.float64, device=device)
        return AdaGCState(gamma, gamma.long())

    def decide(self, norms: Norms, state: tuple[Tensor, ...]) -> tuple[Scale, AdaGCState]:
        gamma, seen = state
        norm = norms.per_group
        warm = seen < self.warmup
        threshold = (self.lambda_rel * gamma).masked_fill(warm, self.lambda_abs)
        coef = clip_coefficient(torch.where(warm, norms.total, norm), threshold)

        clipped = norm * coef
        smallest = torch.where(gamma > 0, torch.minimum(gamma, clipped), clipped)
        new = torch.where(warm, smallest, self.beta * gamma + (1 - self.beta) * clipped)
        taken = norms.finite & new.isfinite() & (clipped > 0)
        return Scale(coef, threshold), AdaGCState(torch.where(taken, new, gamma), seen + taken)
