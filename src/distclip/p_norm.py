"""The p-norm's arithmetic behind the sums, over Python floats or tensors: combine, root, round."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from distclip.values import Column, Number, each, largest_of, sum_of

T = TypeVar("T", float, Tensor)

# Policies see norms of so many bits: what the parameters' precision warrants, less those that
# depend on the order of a sum.
SINGLE_BITS, DOUBLE_BITS = 24, 48


@dataclass(frozen=True)
class PNorm:
    """A norm of order `p`: what is added up for it, and what it is of that.

    Power sums are Σ|g|^p; where p is inf they are maxima. A gradient's factor f changes its power
    sum by |f|^p, and a maximum by |f|.
    """

    p: float

    @cached_property
    def is_max(self) -> bool:
        return self.p == math.inf

    @cached_property
    def reduce_op(self) -> Literal["sum", "max"]:
        """By which ranks' power sums become one."""
        return "max" if self.is_max else "sum"

    def power_of(self, factor: Any) -> Any:
        """What a factor of gradients does to their power sum."""
        return factor if self.is_max else factor**self.p

    def combine(self, power_sums: Column) -> Any:
        """One power sum of several."""
        return largest_of(power_sums) if self.is_max else sum_of(power_sums)

    def finish(self, power_sums: Any) -> Any:
        """Power sums, of any shape, to norms."""
        p = self.p
        if isinstance(power_sums, Tensor):
            if p in (1, math.inf):
                return power_sums.clone()
            return power_sums.sqrt() if p == 2 else power_sums.pow(1 / p)
        if p == 2:
            return math.sqrt(power_sums)
        if p in (1, math.inf):
            return power_sums
        try:
            return power_sums ** (1 / p)
        except OverflowError:
            return math.inf


@lru_cache(maxsize=16)
def p_norm(p: float) -> PNorm:
    """The `PNorm` of order `p`, made once."""
    return PNorm(p)


def norm_of(sums: Tensor, p: float) -> Tensor:
    """Turn float64 power sums (maxima where `p` is inf) into norms of the same shape and dtype."""
    return p_norm(p).finish(sums)


def norm_of_norms(norms: Column, p: float) -> Number:
    """The norm of parts whose norms are known."""
    order = p_norm(p)
    if order.is_max:
        return order.combine(norms)
    return order.finish(order.combine(each(order.power_of, norms)))


def rounded(norms: T, bits: int) -> T:
    """The nearest numbers of so many bits (the leading one counted): a float, or float64 of any
    shape. No host sync.

    The order in which power sums are added changes with the sharding, and their last bits with it;
    a decision must not. Norms of gradients that are all alike lie on ties more often than by
    chance: what is within `near` last places of one counts as one, and goes to even. Only the
    precision is bounded, not the range: inf, NaN and what would round up to inf stay as they are.
    """
    largest, shift, odd, up, kept = rounding_of(bits)
    if isinstance(norms, Tensor):
        given: Any = norms.view(torch.int64)
    elif norms <= largest:
        (given,) = _INT.unpack(_FLOAT.pack(norms))
    else:
        return norms
    whole = given + (given >> shift & odd) + up & kept
    if isinstance(norms, Tensor):
        return torch.where(norms <= largest, whole.view(torch.float64), norms)
    return _FLOAT.unpack(_INT.pack(whole))[0]


@lru_cache(maxsize=4)
def rounding_of(bits: int) -> tuple[float, int, int, int, int]:
    """What `rounded` works with: the largest float64 of so many bits; how far its bits are shifted
    for the one that says whether down would leave an odd number, and that bit, twice `near`; what
    is added to all; and which bits are kept."""
    drop = 53 - bits
    place = min(9, drop - 4)
    near = 1 << place
    largest = math.ldexp(2 - 2.0 ** (1 - bits), 1023)
    return largest, drop - place - 1, 2 * near, (1 << drop - 1) - near, -(1 << drop)


def bits_of(numbers: Sequence[float]) -> list[int]:
    """Python floats as the int64 that `view(torch.int64)` makes of float64."""
    floats, ints = _codecs(len(numbers))
    return list(ints.unpack(floats.pack(*numbers)))


@lru_cache(maxsize=16)
def _codecs(count: int) -> tuple[struct.Struct, struct.Struct]:
    """Of so many float64 and int64 side by side."""
    return struct.Struct(f"<{count}d"), struct.Struct(f"<{count}q")


_FLOAT, _INT = _codecs(1)
