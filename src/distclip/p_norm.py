"""The p-norm's arithmetic, behind the sums: root and rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def norm_of(sums: Tensor, p: float) -> Tensor:
    """Turn float64 power sums (maxima where `p` is inf) of any shape into norms of the same shape
    and dtype."""
    if p == math.inf or p == 1:
        return sums.clone()
    return sums.sqrt() if p == 2 else sums.pow(1 / p)


def rounded(norms: Tensor, bits: int) -> Tensor:
    """The nearest numbers of so many bits (the leading one counted): float64 of the same shape. No
    host sync.

    The order in which power sums are added changes with the sharding, and their last bits with it;
    a decision must not. Norms of gradients that are all alike lie on ties more often than by
    chance: what is within `near` last places of one counts as one, and goes to even. Only the
    precision is bounded, not the range: inf, NaN and what would round up to inf stay as they are.
    """
    drop, given = 53 - bits, norms.view(torch.int64)
    place = min(9, drop - 4)
    near = 1 << place
    # twice `near` where rounding down would leave an odd number
    odd = given >> drop - place - 1 & 2 * near
    whole = (given + odd + ((1 << drop - 1) - near) & -(1 << drop)).view(torch.float64)
    return torch.where(norms <= _largest(bits), whole, norms)


def _largest(bits: int) -> float:
    """The largest float64 of so many bits."""
    return math.ldexp(2 - 2.0 ** (1 - bits), 1023)
