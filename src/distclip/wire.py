"""Stage 4a: what one step's message holds, packed and unpacked.

SUM: groups' power sums · watched power sums · policies' stats · drift · ragged · count · bad · fault · v (3) · v² (3)
MAX (p = inf): groups' maxima · watched maxima · stats · count · bad · fault · v (3) · -v (3)

  drift   Σ weight · power sum: 0 where replicas are equal
  ragged  Σ weight · [has a gradient]: 0 where all holders of a piece have one, or none has
  count   gradients present                    bad    gradient tensors with inf or NaN
  fault   ranks that found something wrong     v      16-bit tokens, equal on all ranks
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TOKENS = 3  # call counter, operation, last decision
RAGGED = 1e-6  # the weights are at least 1/8: one missing gradient shows, and rounding does not


def extra_words(norm_type: float, stats: int) -> int:
    """Words of the message beside one for each group and watched layer."""
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
        share, weight: [pieces] float64; group, layer: [pieces] int64, on the compute device; `layer` is empty where none is watched.
    """

    norm_type: float
    groups: int
    layers: int
    stats: int
    ranks: int
    share: Tensor
    weight: Tensor
    group: Tensor
    layer: Tensor

    def pack(self, sums: Tensor, has: Tensor, stats: Tensor, found: Tensor | None, tail: Tensor) -> Tensor:
        """[words] float64. No host sync.

        Args:
            sums: [pieces] float64 power sums (maxima), 0 where there is no gradient.
            has: [pieces] float64, 1 where there is one.
            stats: [stats] float64.
            found: [] float64, above 0 where a scaler met inf or NaN, perhaps in a parameter that is no piece; None without a scaler.
            tail: [4] float64: 1 where this rank found something wrong, and the three tokens, whole numbers below 65536.
        """
        bad = (~sums.isfinite()).sum().double()
        bad = (bad if found is None else torch.maximum(bad, found)).reshape(1)
        v, count = tail[1:], has.sum().reshape(1)
        if math.isinf(self.norm_type):
            top = sums.nan_to_num(nan=math.inf, posinf=math.inf)
            return torch.cat([*self._spread(top, "amax"), stats, count, bad, tail, -v])
        # an inf or NaN makes drift meaningless; such a step is not judged by it
        drift, ragged = (sums * self.weight).sum().reshape(1), (has * self.weight).sum().reshape(1)
        return torch.cat([*self._spread(sums * self.share, "sum"), stats, drift, ragged, count, bad, tail, v * v])

    def _spread(self, values: Tensor, reduce: str) -> list[Tensor]:
        """[groups] and, where layers are watched, [layers]: pieces' values added up, or the largest of them."""
        out: list[Tensor] = []
        for count, index in ((self.groups, self.group), (self.layers, self.layer)):
            if count == 1 and len(values):
                out.append((values.sum() if reduce == "sum" else values.amax()).reshape(1))
            elif count:
                out.append(torch.zeros(count, dtype=torch.float64, device=values.device).scatter_reduce_(0, index, values, reduce))
        return out

    def sums(self, message: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Power sums [groups], watched ones [layers], stats [stats], and the number of bad gradients []."""
        start = self.groups + self.layers
        after = start + self.stats
        bad = after + (1 if math.isinf(self.norm_type) else 3)
        return message[: self.groups], message[self.groups : start], message[start:after], message[bad]

    def total(self, message: Tensor) -> Tensor:
        """[] float64: the power sum of all groups; inf where it is finite and the norm, its p-th root, is not (p below 1)."""
        total = message[: self.groups].sum()
        if self.norm_type < 1:
            total = torch.where(total.pow(1 / self.norm_type).isfinite(), total, math.inf)
        return total

    def stop(self, message: Tensor, tolerance: float | None) -> Tensor:
        """[] float32 on the message's device: 1 where `guard.judge` would not let the step go on. No host sync."""
        total = self.total(message)
        rest = message[self.groups + self.layers + self.stats :]
        v, other = rest[-2 * TOKENS : -TOKENS].long(), rest[-TOKENS:].long()
        if math.isinf(self.norm_type):
            _, bad, fault = rest[:3].unbind()
            go = (v == -other).all()
        else:
            drift, ragged, _, bad, fault = rest[:5].unbind()
            go = (self.ranks * other == v * v).all() & (ragged.abs() <= RAGGED)
            if tolerance is not None:
                go = go & (drift.abs() <= tolerance * total)
        return (~(go & (bad == 0) & (fault == 0) & total.isfinite())).float()

    def told(self, message: Tensor) -> Tensor:
        """What `flags` reads of a message: the sum over all groups, and the words behind groups, layers and stats."""
        return torch.cat([self.total(message).reshape(1), message[self.groups + self.layers + self.stats :]])

    def flags(self, host: Sequence[float]) -> Flags:
        """From the numbers of `told` on the host."""
        total, *rest = host
        v, other = rest[-2 * TOKENS : -TOKENS], rest[-TOKENS:]
        if math.isinf(self.norm_type):
            count, bad, fault = rest[:3]
            return Flags(0.0, 0.0, count, bad, fault, all(a == -b for a, b in zip(v, other, strict=True)), total)
        drift, ragged, count, bad, fault = rest[:5]
        # all v are equal iff W Σv² = (Σv)²: whole numbers, exact
        agreed = all(self.ranks * int(square) == int(s) ** 2 for s, square in zip(v, other, strict=True))
        return Flags(drift, ragged, count, bad, fault, agreed, total)
