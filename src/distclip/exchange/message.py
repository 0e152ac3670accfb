"""Stage 4a: what one step's message holds, packed and unpacked.

SUM: groups' power sums · watched power sums · policies' stats · drift · ragged · count · bad ·
fault · v (3) · v² (3) MAX (p = inf): groups' maxima · watched maxima · stats · count · bad · fault
· v (3) · -v (3)

  drift   Σ weight · power sum: 0 where replicas are equal
  ragged  Σ weight · [has a gradient]: 0 where all holders of a piece have one, or none has
  count   gradients present                    bad    gradient tensors with inf or NaN
  fault   ranks that found something wrong     v      16-bit tokens, equal on all ranks
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

TOKENS = 3  # call counter, operation, last decision
PRESENCE_TOLERANCE = (
    1e-6  # the weights are at least 1/8: one missing gradient shows, and rounding does not
)


def num_check_words(norm_type: float, stats: int) -> int:
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

    @property
    def finite(self) -> bool:
        return self.bad == 0 and math.isfinite(self.total)


@dataclass(frozen=True, slots=True)
class MessageLayout:
    """Prepared at set-up; packs and unpacks vectors of one fixed length.

    Args:
        share, weight: [pieces] float64; group, layer: [pieces] int64, on the compute device;
            `layer` is empty where none is watched.
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
    _both: Tensor = field(init=False)  # [2, pieces]: share, weight
    _none: Tensor = field(init=False)  # [0]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_both", torch.stack([self.share, self.weight]))
        object.__setattr__(self, "_none", self.share[:0])

    def present(self, has: Tensor) -> Tensor:
        """What `pack` says of the gradients that are there: [2] float64, ragged and count; [1] for
        maxima, count alone.

        Args:
            has: [pieces] float64, 1 where there is one.
        """
        return (
            has.sum().reshape(1)
            if math.isinf(self.norm_type)
            else torch.stack([(has * self.weight).sum(), has.sum()])
        )

    def second(self, token: Any) -> Any:
        """What travels beside a token (a number, or a tensor of them), so that the reduced words
        tell whether all ranks sent the same."""
        return -token if math.isinf(self.norm_type) else token * token

    def bad(self, sums: Tensor) -> Tensor:
        """[] float64: how many of the power sums are not finite. No host sync."""
        zero = sums - sums  # NaN where an inf or NaN is: two operations where isfinite takes five
        return zero.ne(zero).sum(dtype=torch.float64)

    def pack(self, sums: Tensor, stats: Tensor, words: Tensor) -> Tensor:
        """[words] float64. No host sync.

        Args:
            sums: [pieces] float64 power sums (maxima), 0 where there is no gradient.
            stats: [stats] float64.
            words: float64, what follows stats and drift: `present`; bad gradients, perhaps of
                parameters that are no pieces; 1 where this rank found something wrong; TOKENS
                tokens, whole numbers below 65536; the `second` of each.
        """
        if math.isinf(self.norm_type):
            return torch.cat(
                [
                    *self._spread(sums.nan_to_num(nan=math.inf, posinf=math.inf), "amax"),
                    stats,
                    words,
                ]
            )
        # an inf or NaN makes drift meaningless; such a step is not judged by it
        if self.groups == 1 and not self.layers:
            both = (self._both * sums).sum(1)
            return (
                torch.cat([both[:1], stats, both[1:], words])
                if self.stats
                else torch.cat([both, words])
            )
        drift = (sums * self.weight).sum(0, keepdim=True)
        return torch.cat([*self._spread(sums * self.share, "sum"), stats, drift, words])

    def _spread(self, values: Tensor, reduce: str) -> list[Tensor]:
        """[groups] and, where layers are watched, [layers]: pieces' values added up, or the largest
        of them."""
        out: list[Tensor] = []
        for count, index in ((self.groups, self.group), (self.layers, self.layer)):
            if count == 1 and len(values):
                out.append((values.sum() if reduce == "sum" else values.amax()).reshape(1))
            elif count:
                out.append(
                    torch.zeros(count, dtype=torch.float64, device=values.device).scatter_reduce_(
                        0, index, values, reduce
                    )
                )
        return out

    def sums(self, message: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Power sums [groups], watched ones [layers], stats [stats], and the number of bad
        gradients []."""
        start = self.groups + self.layers
        after = start + self.stats
        bad = after + (1 if math.isinf(self.norm_type) else 3)
        layers, stats = (
            message[self.groups : start] if self.layers else self._none,
            message[start:after] if self.stats else self._none,
        )
        return message[: self.groups], layers, stats, message[bad]

    def total(self, message: Tensor) -> Tensor:
        """[] float64: the power sum of all groups; inf where it is finite and the norm, its p-th
        root, is not (p below 1)."""
        total = message[0] if self.groups == 1 else message[: self.groups].sum()
        if self.norm_type < 1:
            total = torch.where(total.pow(1 / self.norm_type).isfinite(), total, math.inf)
        return total

    def rest(self, message: Tensor) -> Tensor:
        """The words behind groups, layers and stats."""
        return message[self.groups + self.layers + self.stats :]

    def go(self, message: Tensor, total: Tensor, tolerance: float | None) -> Tensor:
        """[] bool on the message's device: whether `guard.judge` would let the step go on. No host
        sync."""
        rest = self.rest(message)
        v, other = rest[-2 * TOKENS : -TOKENS].long(), rest[-TOKENS:].long()
        if math.isinf(self.norm_type):
            _, bad, fault = rest[:3].unbind()
            go = (v == -other).all()
        else:
            drift, ragged, _, bad, fault = rest[:5].unbind()
            go = (self.ranks * other == v * v).all() & (ragged.abs() <= PRESENCE_TOLERANCE)
            if tolerance is not None:
                go = go & (drift.abs() <= tolerance * total)
        return go & (bad == 0) & (fault == 0) & total.isfinite()

    def flags(self, total: float, rest: Sequence[float]) -> Flags:
        """From the numbers of `total` and `rest` on the host."""
        v, other = rest[-2 * TOKENS : -TOKENS], rest[-TOKENS:]
        if math.isinf(self.norm_type):
            count, bad, fault = rest[:3]
            return Flags(
                0.0,
                0.0,
                count,
                bad,
                fault,
                all(a == -b for a, b in zip(v, other, strict=True)),
                total,
            )
        drift, ragged, count, bad, fault = rest[:5]
        # all v are equal iff W Σv² = (Σv)²: whole numbers, exact
        agreed = all(
            self.ranks * int(square) == int(s) ** 2 for s, square in zip(v, other, strict=True)
        )
        return Flags(drift, ragged, count, bad, fault, agreed, total)
