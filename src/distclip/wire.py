"""Stage 4a: what one step's message holds, packed and unpacked.

SUM: groups' power sums · policies' stats · drift · ragged · count · bad · fault · v (3) · v² (3)
MAX (p = inf): groups' maxima · stats · count · bad · fault · v (3) · -v (3)

  drift   Σ weight · power sum: 0 where replicas are equal
  ragged  Σ weight · [has a gradient]: 0 where all holders of a piece have one, or none has
  count   gradients present                    bad    gradient tensors with inf or NaN
  fault   ranks that found something wrong     v      16-bit tokens, equal on all ranks
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TOKENS = 3  # call counter, operation, last decision
RAGGED = 1e-6  # the weights are at least 1/8: one missing gradient shows, and rounding does not


def extra_words(norm_type: float, stats: int) -> int:
    """Words of the message beside one for each group."""
    return stats + (3 if math.isinf(norm_type) else 5) + 2 * TOKENS


class Flags(NamedTuple):
    """What the guard reads on the host, in one go."""

    drift: float
    ragged: float
    present: float
    bad: float
    fault: float
    agreed: bool
    total: float  # the sum that drift is compared with


@dataclass(frozen=True, slots=True)
class Wire:
    """Prepared at set-up; packs and unpacks vectors of one fixed length.

    Args:
        share, weight: [pieces] float64; group: [pieces] int64, on the compute device.
    """

    norm_type: float
    groups: int
    stats: int
    ranks: int
    share: Tensor
    weight: Tensor
    group: Tensor

    def pack(self, sums: Tensor, has: Tensor, stats: Tensor, found: Tensor, fault: bool, tokens: Tensor) -> Tensor:
        """[words] float64.

        Args:
            sums: [pieces] float64 power sums (maxima), 0 where there is no gradient.
            has: [pieces] float64, 1 where there is one.
            found: [] float64, above 0 where a scaler met inf or NaN, perhaps in a parameter that is no piece.
            tokens: [3] float64 whole numbers below 65536.
        """
        device = sums.device
        bad = torch.maximum((~sums.isfinite()).sum().double(), found).reshape(1)
        count = has.sum().reshape(1)
        wrong = sums.new_full((1,), float(fault))
        if math.isinf(self.norm_type):
            top = torch.zeros(self.groups, dtype=torch.float64, device=device)
            top.scatter_reduce_(0, self.group, sums.nan_to_num(nan=math.inf, posinf=math.inf), "amax")
            return torch.cat([top, stats, count, bad, wrong, tokens, -tokens])
        total = torch.zeros(self.groups, dtype=torch.float64, device=device)
        total.index_add_(0, self.group, sums * self.share)
        finite = torch.where(sums.isfinite(), sums, 0.0)
        drift, ragged = (finite * self.weight).sum().reshape(1), (has * self.weight).sum().reshape(1)
        return torch.cat([total, stats, drift, ragged, count, bad, wrong, tokens, tokens * tokens])

    def sums(self, message: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Power sums [groups], stats [stats], and the number of bad gradients []."""
        after = self.groups + self.stats
        bad = after + (1 if math.isinf(self.norm_type) else 3)
        return message[: self.groups], message[self.groups : after], message[bad]

    def stop(self, message: Tensor, tolerance: float | None) -> Tensor:
        """[] float32 on the message's device: 1 where `guard.judge` would not let the step go on. No host sync."""
        total = message[: self.groups].sum()
        rest = message[self.groups + self.stats :]
        v, other = rest[-2 * TOKENS : -TOKENS].long(), rest[-TOKENS:].long()
        if math.isinf(self.norm_type):
            _, bad, fault = rest[:3]
            go = (v == -other).all()
        else:
            drift, ragged, _, bad, fault = rest[:5]
            go = (self.ranks * other == v * v).all() & (ragged.abs() <= RAGGED)
            if tolerance is not None:
                go = go & (drift.abs() <= tolerance * total)
        return (~(go & (bad == 0) & (fault == 0) & total.isfinite())).float()

    def flags(self, host: list[float]) -> Flags:
        """From the message's numbers on the host."""
        rest = host[self.groups + self.stats :]
        v = rest[-2 * TOKENS : -TOKENS]
        other = rest[-TOKENS:]
        total = sum(host[: self.groups])
        if math.isinf(self.norm_type):
            count, bad, fault = rest[:3]
            return Flags(0.0, 0.0, count, bad, fault, all(a == -b for a, b in zip(v, other, strict=True)), total)
        drift, ragged, count, bad, fault = rest[:5]
        # all v are equal iff W Σv² = (Σv)²: whole numbers, exact
        agreed = all(self.ranks * int(square) == int(s) ** 2 for s, square in zip(v, other, strict=True))
        return Flags(drift, ragged, count, bad, fault, agreed, total)
