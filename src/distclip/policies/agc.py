"""A threshold for each unit of a weight, relative to the unit's own size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distclip.errors import ConfigError
from distclip.p_norm import norm_of
from distclip.passed import as_number
from distclip.records import Norms, UnitScale


@dataclass(frozen=True)
class AGC:
    """g_i ← g_i · min(1, λ · max(|w_i|, eps) / |g_i|) for each unit i: a row of a weight (all that
    leads to one output), a whole bias.

    Adaptive gradient clipping, Brock, De, Smith, Simonyan 2021 (arXiv:2102.06171), equation 3; the
    floor eps lets weights that start at zero move. The paper leaves out the last linear layer:
    `groups=by_name({"head.*": Exempt(in_total=True)})`. Norms are 2-norms.

    Tracks nothing. A unit that lies on one rank is clipped there; for units that are cut (by tensor
    parallelism along another dimension than the first, a sharded bias) two numbers each travel in
    the step's message: print(clipper.plan) says how many. It reads weights as well as gradients, by
    torch's operations in float64. FSDP1, whose shards cut anywhere, is refused: use fully_shard.

    Args:
        clipping: λ; 0.01 in the paper for batches of 4096, more for smaller ones.
        eps: floor of a unit's norm; 1e-3 in the paper.

    Raises:
        ConfigError: an argument that is not positive and finite.
    """

    clipping: float = 0.01
    eps: float = 1e-3
    num_stats = 2  # see units.Units

    def __post_init__(self) -> None:
        for name, value in (("clipping", self.clipping), ("eps", self.eps)):
            if not 0 < as_number(value) < math.inf:
                raise ConfigError(
                    f"AGC: {name}={value!r} must be positive and finite; the paper "
                    f"takes clipping=0.01, eps=1e-3"
                )

    def init(self, groups: int, device: torch.device) -> tuple[Tensor, ...]:
        return ()

    def unit_coefs(self, weight: Tensor, grad: Tensor) -> Tensor:
        """[units] float64, from the norms of each unit's weights and gradients: exactly 1 within
        the threshold."""
        limit = self.clipping * weight.clamp(min=self.eps)
        return torch.where(grad > limit, limit / grad, torch.ones_like(grad))

    def decide(
        self, norms: Norms, state: tuple[Tensor, ...]
    ) -> tuple[UnitScale, tuple[Tensor, ...]]:
        clipped, after = norms.stats.reshape(-1, self.num_stats).unbind(1)
        threshold = torch.full_like(norms.per_group, self.clipping)
        # a sum of squares is rounded by itself: where no unit is clipped the norm stays what it was
        after = torch.where(
            clipped > 0,
            torch.minimum(norm_of(after, norms.norm_type), norms.per_group),
            norms.per_group,
        )
        return UnitScale(threshold, clipped > 0, after), state
