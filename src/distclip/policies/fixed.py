"""A constant threshold for the norm."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from distclip.errors import ConfigError
from distclip.passed import as_number, check_flag
from distclip.records import Norms, Scale


def checked_threshold(name: str, given: float, allow_zero: bool) -> float:
    """The threshold as a float. ConfigError (a ValueError) if it is no number, negative, NaN, or a
    zero that was not asked for."""
    check_flag("allow_zero", allow_zero)
    value = as_number(given)
    if math.isnan(value) or value < 0:
        shown = given if math.isnan(value) else value
        raise ConfigError(
            f"{name}={shown!r} is not a threshold; it must be positive (math.inf only measures)"
        )
    if value == 0 and not allow_zero:
        raise ConfigError(
            f"{name}=0 sets every gradient to zero; if that is meant, say "
            f"allow_zero=True on the policy, else use math.inf"
        )
    return value


@dataclass(frozen=True)
class FixedNorm:
    """g ← g · c / max(|g|, c): the direction is kept, the norm is at most c = `max_norm`.

    Exactly 1, and no gradient is touched, where |g| ≤ c. Pascanu, Mikolov, Bengio 2013
    (arXiv:1211.5063), algorithm 1.

    Args:
        max_norm: in the gradients' own unit; `math.inf` only measures.
        allow_zero: accept 0, which zeroes every gradient.

    Raises:
        ConfigError: negative, NaN, or zero without `allow_zero`.
    """

    max_norm: float
    allow_zero: bool = field(default=False, repr=False)
    user_threshold = True  # set by the user: if it nearly always clips, a warning says so

    def __post_init__(self) -> None:
        checked_threshold("max_norm", self.max_norm, self.allow_zero)

    def init(self, groups: int, device: torch.device) -> tuple[Tensor, ...]:
        return ()

    def decide(self, norms: Norms, state: tuple[Tensor, ...]) -> tuple[Scale, tuple[Tensor, ...]]:
        threshold = torch.full_like(norms.per_group, self.max_norm)
        if (
            0 < self.max_norm < math.inf
        ):  # fmax passes over NaN: 1 there, as `clip_coefficient` has it
            return Scale(threshold / torch.fmax(norms.per_group, threshold), threshold), state
        return Scale(clip_coefficient(norms.per_group, threshold), threshold), state


@overload
def clip_coefficient(norm: float, threshold: float) -> float: ...
@overload
def clip_coefficient(norm: Tensor, threshold: Tensor) -> Tensor: ...
def clip_coefficient(norm: Any, threshold: Any) -> Any:
    """threshold / max(norm, threshold), and exactly 1 also where both are 0 or inf, or the norm is
    NaN: of floats, or [groups] float64."""
    if isinstance(norm, Tensor):
        return torch.where(norm > threshold, threshold / norm, torch.ones_like(norm))
    return threshold / norm if norm > threshold else 1.0
