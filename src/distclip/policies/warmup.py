"""A fixed threshold for the first steps, then another policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distclip.errors import ConfigError
from distclip.policies.fixed import coefficient
from distclip.policies.policy import Policy, describe
from distclip.policies.value import FixedValue
from distclip.records import Clamp, Norms, Scale


@dataclass(frozen=True, repr=False)
class Warmup:
    """The first `steps` steps are clipped at `max_norm`; meanwhile `policy` sees the norms and
    builds up its statistics, then it decides.

    For policies that clip badly, or not at all, before they have seen enough (AutoClip, ZClip,
    SkipSpikes). A threshold that rises or falls over the first steps is `Scheduled`.

    Tracks what `policy` tracks, which goes on as if it had decided, and sends what `policy` sends.
    Steps that were skipped do not count.

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
    _inner = tuple  # see first_inner

    def __post_init__(self) -> None:
        check_policy("Warmup", self.policy)
        if isinstance(self.policy, FixedValue):
            raise ConfigError(_CLAMPS.format(self.policy))
        if hasattr(self.policy, "unit_coefs"):
            raise ConfigError(_BY_UNITS.format(describe(self.policy)))
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ConfigError(
                f"Warmup: steps={self.steps!r} must be a whole number of at least 1; "
                f"without any, use the policy alone"
            )
        if not self.max_norm > 0:
            raise ConfigError(
                f"Warmup: max_norm={self.max_norm!r} must be positive (math.inf only measures)"
            )
        pass_on_stats(self, self.policy)

    def __repr__(self) -> str:
        return f"Warmup({describe(self.policy)}, steps={self.steps}, max_norm={self.max_norm})"

    def init(self, groups: int, device: torch.device) -> tuple[Tensor, ...]:
        return (
            torch.zeros((), dtype=torch.int64, device=device),
            *first_inner(self, self.policy, groups, device),
        )

    def decide(self, norms: Norms, state: tuple[Tensor, ...]) -> tuple[Scale, tuple[Tensor, ...]]:
        count = state[0]  # [] int64: steps taken so far
        answer, new = self.policy.decide(norms, self._inner(state[1:]))
        if not isinstance(answer, Scale):
            raise ConfigError(
                (_CLAMPS if isinstance(answer, Clamp) else _BY_UNITS).format(describe(self.policy))
            )
        warm = count < self.steps
        threshold = torch.where(
            warm, torch.full_like(norms.per_group, self.max_norm), answer.threshold
        )
        coef = torch.where(warm, coefficient(norms.per_group, threshold), answer.coef)
        taken = norms.finite if answer.skip is None else norms.finite & ~answer.skip.any()
        return Scale(coef, threshold, answer.skip), (count + taken, *new)


_CLAMPS = (
    "Warmup: {} clamps elements, and a threshold of the norm cannot stand in for it; wrap a "
    "policy that scales"
)
_BY_UNITS = (
    "Warmup: {} scales by units, and a threshold of the norm cannot stand in for it; wrap "
    "a policy that scales by one coefficient"
)


def check_policy(who: str, policy: Any) -> None:
    """ConfigError if it is no policy."""
    if isinstance(policy, type) or not (hasattr(policy, "init") and hasattr(policy, "decide")):
        raise ConfigError(
            f"{who}: policy={policy!r} has no init and decide; pass e.g. distclip.FixedNorm(1.0)"
        )


def pass_on_stats(wrapper: Any, policy: Policy) -> None:
    """What the inner policy adds to the message travels under the wrapper's name."""
    for name in ("words", "local_stats", "unit_coefs", "chosen"):
        if hasattr(policy, name):
            object.__setattr__(wrapper, name, getattr(policy, name))


def first_inner(
    wrapper: Any, policy: Policy, groups: int, device: torch.device
) -> tuple[Tensor, ...]:
    """The inner policy's first state. What makes a state of its kind is noted: it may be a named
    tuple, and the wrapper's own is flat."""
    state = policy.init(groups, device)
    object.__setattr__(wrapper, "_inner", getattr(state, "_make", tuple))
    return state
