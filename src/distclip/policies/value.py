"""A constant bound for each element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distclip.errors import GradientError
from distclip.measure import norm_of, power_sums
from distclip.policies.fixed import checked_threshold
from distclip.records import Clamp, Norms

_CHUNK = 1 << 20  # elements: bounds the clamped copy


@dataclass(frozen=True)
class FixedValue:
    """g_i ← min(max(g_i, -v), v): bounds each element and bends the direction. Needs no message of its own.

    Mikolov 2012 (thesis, Brno), section 3.3. Whether anything was beyond the value, and the norm afterwards, come from the same
    collective as the norm.

    Args:
        clip_value: v, in the gradients' own unit.
        allow_zero: accept 0, which zeroes every gradient.

    Raises:
        ConfigError: negative, NaN, or zero without `allow_zero`.
    """

    clip_value: float
    allow_zero: bool = field(default=False, repr=False)
    words = 2  # anything beyond, and the power sum afterwards

    def __post_init__(self) -> None:
        checked_threshold("clip_value", self.clip_value, self.allow_zero)

    def init(self, groups: int, device: torch.device) -> tuple[Tensor, ...]:
        return ()

    def decide(self, norms: Norms, state: tuple[Tensor, ...]) -> tuple[Clamp, tuple[Tensor, ...]]:
        value = torch.full_like(norms.per_group, self.clip_value)
        beyond, after = norms.stats.reshape(-1, self.words).unbind(1)
        return Clamp(value, beyond > 0, norm_of(after, norms.norm_type)), state

    def local_stats(self, grads: Sequence[Tensor], shares: Sequence[float], scale: Tensor, norm_type: float) -> Tensor:
        """[2]: whether some |g| · scale > v on this rank, and sum of (|clamped g| · scale)^p · share (the maximum for p = inf)."""
        out = torch.zeros(2, dtype=torch.float64, device=scale.device)
        bound = self.clip_value / scale
        for grad, share in zip(grads, shares, strict=True):
            if grad.is_complex():
                raise GradientError(
                    f"a complex gradient of shape {tuple(grad.shape)} has no order, so its elements cannot be clamped; clip its norm, or "
                    "exempt it by groups=by_name({...: Exempt()})"
                )
            flat = (grad.coalesce().values() if grad.is_sparse else grad).reshape(-1)
            for chunk in flat.split(_CHUNK):
                limit = bound.to(chunk.device, torch.promote_types(chunk.dtype, torch.float32))
                clamped = torch.minimum(torch.maximum(chunk.to(limit.dtype), -limit), limit)
                after = power_sums([clamped], norm_type)[0].to(out.device)
                beyond = (chunk.abs() > limit).any().to(out.device, torch.float64)
                out[0] = torch.maximum(out[0], beyond)
                out[1] = torch.maximum(out[1], after) if norm_type == float("inf") else out[1] + share * after
        out[1] *= scale if norm_type == float("inf") else scale**norm_type
        return out
