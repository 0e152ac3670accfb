"""Skips steps whose norm is an outlier."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distclip.errors import ConfigError
from distclip.passed import as_number
from distclip.policies.policy import Policy, describe
from distclip.policies.wrapping import check_policy, inner_state, pass_on_stats, wrap_state
from distclip.records import Clamp, Norms, Scale, UnitScale


@dataclass(frozen=True, repr=False)
class SkipSpikes:
    """A step with |g| > μ + sigma · σ and |g| > factor · μ is skipped like a bad one; on all others
    `policy` decides.

    μ and σ are the mean and standard deviation (n-1) of the norms of the last `window` steps that
    were taken; |g| is the norm over the groups that this policy governs, so that the step is judged
    as a whole. To leave out the steps of a spike is Chowdhery et al. 2022 (PaLM, arXiv:2204.02311,
    section 5.1); this rule and its numbers, but for `factor`, are those of OLMo-core's
    SkipStepOptimizer (2024).

    Tracks the raw norm, of taken steps alone, and sends what `policy` sends. A skipped step changes
    nothing, the statistics of `policy` included: norms that have risen for good are skipped until
    the clipper's `skip_limit` ends the run.

    Args:
        policy: what happens to the other steps.
        sigma: how many standard deviations above the mean.
        window: how many norms are kept, at 8 bytes each.
        warmup: how many norms must be known before the first step is skipped.
        factor: how many times the mean, so that norms that hardly vary are not cut off at a hair's
            breadth; 1 for OLMo-core's rule.

    Raises:
        ConfigError: an argument out of range.
    """

    policy: Policy
    sigma: float = 6.0
    window: int = 128
    warmup: int = 64
    factor: float = 2.0

    def __post_init__(self) -> None:
        check_policy("SkipSpikes", self.policy)
        if not 0 < as_number(self.sigma) < math.inf:
            raise ConfigError(
                f"SkipSpikes: sigma={self.sigma!r} must be positive and finite; 6 is usual"
            )
        if not isinstance(self.window, int) or self.window < 2:
            raise ConfigError(
                f"SkipSpikes: window={self.window!r} must be a whole number of at "
                f"least 2; it counts the norms that are kept"
            )
        if not isinstance(self.warmup, int) or not 2 <= self.warmup <= self.window:
            raise ConfigError(
                f"SkipSpikes: warmup={self.warmup!r} must be a whole number from 2 "
                f"to window={self.window}"
            )
        if not 1 <= as_number(self.factor) < math.inf:
            raise ConfigError(
                f"SkipSpikes: factor={self.factor!r} must be at least 1 and finite; "
                f"a spike is above the mean"
            )
        pass_on_stats(self, self.policy)

    def __repr__(self) -> str:
        numbers = (
            f"sigma={self.sigma}, window={self.window}, warmup={self.warmup}, factor={self.factor}"
        )
        return f"SkipSpikes({describe(self.policy)}, {numbers})"

    def init(self, groups: int, device: torch.device) -> tuple[Tensor, ...]:
        # the latest norms, written round and round
        history = torch.zeros(1, self.window, dtype=torch.float64, device=device)
        seen = torch.zeros(1, dtype=torch.int64, device=device)  # norms taken in so far
        inner = self.policy.init(groups, device)
        return wrap_state((history, seen), inner, inner)

    def decide(
        self, norms: Norms, state: tuple[Tensor, ...]
    ) -> tuple[Scale | Clamp | UnitScale, tuple[Tensor, ...]]:
        history, seen, own = state[0], state[1], inner_state(state, 2)
        answer, new = self.policy.decide(norms, own)

        norm = norm_over_groups(norms)
        place = torch.arange(self.window, device=norm.device)
        filled = seen.clamp(max=self.window)
        mean = history.sum(1) / filled
        off = (history - mean).masked_fill(place >= filled, 0)
        limit = torch.maximum(
            mean + self.sigma * (off.square().sum(1) / (filled - 1)).sqrt(), self.factor * mean
        )
        spike = norms.finite & ((seen >= self.warmup) & (norm > limit)).any()
        skip = spike if answer.skip is None else spike | answer.skip.any()

        admitted = norms.finite & ~skip
        taken = admitted & norm.isfinite() & (norm > 0)
        history = torch.where((place == seen % self.window) & taken, norm, history)
        inner = tuple(torch.where(admitted, n, o) for n, o in zip(new, own, strict=True))
        return replace(answer, skip=skip), wrap_state((history, seen + taken), own, inner)


def norm_over_groups(norms: Norms) -> Tensor:
    """[]: the norm over all groups given. Divided by the largest first, so that no power
    overflows."""
    largest = norms.per_group.amax()
    return largest * torch.linalg.vector_norm(
        norms.per_group / largest.masked_fill(largest == 0, 1), norms.norm_type
    )
