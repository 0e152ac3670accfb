"""A constant bound for each element."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distclip.p_norm import norm_of, p_norm
from distclip.policies.fixed import checked_threshold
from distclip.policies.policy import LocalGrads
from distclip.records import Clamp, Norms


@dataclass(frozen=True)
class FixedValue:
    """g_i ← min(max(g_i, -v), v): bounds each element and bends the direction. Needs no message of
    its own.

    Mikolov 2012 (thesis, Brno), section 3.3. Whether anything was beyond the value, the norm
    afterwards, and the cosine between raw and clamped gradient (how far it bends the direction; not
    with p = inf) come from one further read and the same collective as the norm.

    Args:
        clip_value: v, in the gradients' own unit.
        allow_zero: accept 0, which zeroes every gradient.

    Raises:
        ConfigError: negative, NaN, or zero without `allow_zero`.
    """

    clip_value: float
    allow_zero: bool = field(default=False, repr=False)
    num_stats = 5  # see local_stats

    def __post_init__(self) -> None:
        checked_threshold("clip_value", self.clip_value, self.allow_zero)

    def init(self, groups: int, device: torch.device) -> tuple[Tensor, ...]:
        return ()

    def decide(self, norms: Norms, state: tuple[Tensor, ...]) -> tuple[Clamp, tuple[Tensor, ...]]:
        value = torch.full_like(norms.per_group, self.clip_value)
        beyond, after, raw, bounded, both = norms.stats.reshape(-1, self.num_stats).unbind(1)
        # the three are rounded each by itself: where nothing is bounded the norm stays what it was,
        # and a cosine is at most 1
        after = torch.where(
            beyond > 0,
            torch.minimum(norm_of(after, norms.norm_type), norms.per_group),
            norms.per_group,
        )
        cosine = torch.where(raw * bounded > 0, both / (raw.sqrt() * bounded.sqrt()), 1.0).clamp(
            max=1
        )
        if math.isinf(norms.norm_type):
            cosine = torch.full_like(value, math.nan)  # a message of maxima carries no sums
        return Clamp(value, beyond > 0, after, cosine), state

    def local_stats(self, own: LocalGrads) -> Tensor:
        """[groups, 5]: elements beyond v, and of gradients x and clamped ones c, unscaled: Σ|c|^p,
        Σx², Σc², Σx·c. One read."""
        sums = own.grads.clamped_sums(self.clip_value / own.scale, own.norm_type).to(
            own.scale.device
        )
        _, after, raw, bounded, both, beyond = sums.unbind(1)
        after = after * p_norm(own.norm_type).power_of(own.scale)
        square = own.scale.square()
        return own.reduced(
            torch.stack([beyond, after, raw * square, bounded * square, both * square], dim=1)
        )
