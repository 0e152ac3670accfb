"""A threshold from the running mean and variance of the norm."""

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


class ZClipState(NamedTuple):
    mean: Tensor  # [groups] float64: μ
    var: Tensor  # [groups] float64: σ²
    seen: Tensor  # [groups] int64: norms taken in so far


@dataclass(frozen=True)
class ZClip:
    """Only outliers are clipped: with z = (|g| - μ) / σ, a step with z > z_threshold is brought to
    |g| = μ + σ · z_threshold² / z.

    Kumar, Owen, Roy Chowdhury, Güra 2025 (arXiv:2504.02507), reciprocal clipping: the further out,
    the harder it is clipped. Then, with n the norm after it: μ ← α μ + (1-α) n, and with the new μ:
    σ² ← α σ² + (1-α) (n - μ)², as in the authors' code. The first `warmup` norms give the first
    mean and variance.

    Tracks the clipped norm, and in the warm-up the raw one; `max_norm` plays no part in it. Sends
    nothing. A norm of 0 (a group without gradients at this step) is not taken in. The reported
    threshold of a step that is no outlier is μ + z_threshold · σ.

    Args:
        z_threshold: from how many standard deviations above the mean on a norm is an outlier; 2.5
            in the paper.
        alpha: how much of the statistics is kept a step; 0.97 in the paper.
        warmup: how many norms start the statistics; 25 in the authors' code. Outliers are not
            clipped meanwhile.
        max_norm: a bound on the threshold at all times, in the warm-up too. The paper has none; the
            authors' code sets 1.0.

    Raises:
        ConfigError: an argument out of range.
    """

    z_threshold: float = 2.5
    alpha: float = 0.97
    warmup: int = 25
    max_norm: float = math.inf

    def __post_init__(self) -> None:
        if not 0 < as_number(self.z_threshold) < math.inf:
            raise ConfigError(
                f"ZClip: z_threshold={self.z_threshold!r} must be positive and "
                f"finite; the paper takes 2.5"
            )
        if not 0 < as_number(self.alpha) < 1:
            raise ConfigError(
                f"ZClip: alpha={self.alpha!r} must be between 0 and 1; the paper takes 0.97"
            )
        if not isinstance(self.warmup, int) or self.warmup < 2:
            raise ConfigError(
                f"ZClip: warmup={self.warmup!r} must be a whole number of at least "
                f"2; a variance needs two norms"
            )
        if not as_number(self.max_norm) > 0:
            raise ConfigError(
                f"ZClip: max_norm={self.max_norm!r} must be positive (math.inf sets no bound)"
            )

    def init(self, groups: int, device: torch.device) -> ZClipState:
        zeros = torch.zeros(groups, dtype=torch.float64, device=device)
        return ZClipState(zeros, zeros.clone(), zeros.long())

    def decide(self, norms: Norms, state: tuple[Tensor, ...]) -> tuple[Scale, ZClipState]:
        mean, var, seen = state
        norm = norms.per_group
        warm = seen < self.warmup
        edge = (mean + self.z_threshold * var.sqrt()).masked_fill(warm, math.inf)
        outlier = norm > edge
        # σ · z_threshold² / z without a division by σ, which may be 0
        own = torch.where(outlier, mean + self.z_threshold**2 * var / (norm - mean), edge)
        threshold = own.clamp(max=self.max_norm)

        used = torch.where(outlier, own, norm)
        weight = torch.where(
            warm, (seen + 1).double().reciprocal(), torch.full_like(mean, 1 - self.alpha)
        )
        off = used - mean
        new_mean = mean + weight * off
        rest = used - new_mean
        # in the warm-up: the variance of all so far
        new_var = var + weight * (torch.where(warm, off, rest) * rest - var)
        taken = norms.finite & (norm > 0) & new_mean.isfinite() & new_var.isfinite()
        new = ZClipState(
            torch.where(taken, new_mean, mean), torch.where(taken, new_var, var), seen + taken
        )
        return Scale(clip_coefficient(norm, threshold), threshold), new
