"""A fixed threshold for the first steps, then another policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distclip.errors import ConfigError
from distclip.passed import as_number
from distclip.policies.fixed import clip_coefficient
from distclip.policies.policy import Policy, UnitPolicy, describe
from distclip.policies.value import FixedValue
from distclip.policies.wrapping import check_policy, inner_state, pass_on_stats, wrap_state
from distclip.records import Clamp, Norms, Scale


@dataclass(frozen=True, repr=False)
class Warmup:
    """The first `steps` steps are clipped at `max_norm`; meanwhile `policy` sees the norms and
    builds up its statistics, then it decides.

    For policies that clip badly, or not at all, before they have seen enough (AutoClip, ZClip,
    SkipSpikes). A threshold that rises or falls over the first steps is `Scheduled`.

    Tracks what `policy` tracks, whose state is updated as if it had decided, and sends what
    `policy` sends. Steps that were skipped do not count.

    Args:
        policy: one that scales.
        steps: how many.
        max_norm: threshold of each group's norm meanwhile; `math.inf` only measures.

    Raises:
        ConfigError: an argument out of range, or a policy that clamps (FixedValue) or scales by
            units (AGC).
    """

    policy: Policy
    steps: int
    max_norm: float

    def __post_init__(self) -> None:
        check_policy("Warmup", self.policy)
        if isinstance(self.policy, FixedValue):
            raise ConfigError(_CLAMPS.format(self.policy))
        if isinstance(self.policy, UnitPolicy):
            raise ConfigError(_BY_UNITS.format(describe(self.policy)))
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ConfigError(
                f"Warmup: steps={self.steps!r} must be a whole number of at least 1; "
                f"without any, use the policy alone"
            )
        if not as_number(self.max_norm) > 0:
            raise ConfigError(
                f"Warmup: max_norm={self.max_norm!r} must be positive (math.inf only measures)"
            )
        pass_on_stats(self, self.policy)

    def __repr__(self) -> str:
        return f"Warmup({describe(self.policy)}, steps={self.steps}, max_norm={self.max_norm})"

    def init(self, groups: int, device: torch.device) -> tuple[Tensor, ...]:
        inner = self.policy.init(groups, device)
        return wrap_state((torch.zeros((), dtype=torch.int64, device=device),), inner, inner)

    def decide(self, norms: Norms, state: tuple[Tensor, ...]) -> tuple[Scale, tuple[Tensor, ...]]:
        count = state[0]  # [] int64: steps taken so far
        inner = inner_state(state, 1)
        answer, new = self.policy.decide(norms, inner)
        if not isinstance(answer, Scale):
            raise ConfigError(
                (_CLAMPS if isinstance(answer, Clamp) else _BY_UNITS).format(describe(self.policy))
            )
        warm = count < self.steps
        threshold = torch.where(
            warm, torch.full_like(norms.per_group, self.max_norm), answer.threshold
        )
        coef = torch.where(warm, clip_coefficient(norms.per_group, threshold), answer.coef)
        taken = norms.finite if answer.skip is None else norms.finite & ~answer.skip.any()
        return Scale(coef, threshold, answer.skip), wrap_state((count + taken,), inner, new)


_CLAMPS = (
    "Warmup: {} clamps elements, and a threshold of the norm cannot stand in for it; wrap a "
    "policy that scales"
)
_BY_UNITS = (
    "Warmup: {} scales by units, and a threshold of the norm cannot stand in for it; wrap "
    "a policy that scales by one coefficient"
)
