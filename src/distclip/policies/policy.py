"""What a policy is: two pure functions. Equal inputs on all ranks, so equal decisions, without a second message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from distclip.records import Clamp, Norms, Scale


class Policy(Protocol):
    """`init` makes the state, `decide` turns norms and state into a decision and the next state.

    State is any (named) tuple of tensors, empty if there is none. Both must be pure, must not read tensors on the host, and
    must answer for [groups] groups at once. A step that is not finite never reaches the state.
    """

    def init(self, groups: int, device: torch.device) -> tuple[Tensor, ...]: ...

    def decide(self, norms: Norms, state: Any) -> tuple[Scale | Clamp, tuple[Tensor, ...]]: ...


@runtime_checkable
class LocalStats(Protocol):
    """A policy that needs more of the gradients than their norm: its numbers travel in the same message."""

    words: int  # numbers per group

    def local_stats(self, grads: Sequence[Tensor], shares: Sequence[float], scale: Tensor, norm_type: float) -> Tensor:
        """This rank's addend for one group: [words] float64, reduced by SUM (by MAX for p = inf).

        Args:
            grads: the group's local gradients, not unscaled.
            shares: what each counts here, 1/h.
            scale: [] float64, the factor that unscales.
        """
        ...


def describe(policy: Any) -> str:
    """A text that is equal on all ranks for equal policies."""
    return type(policy).__qualname__ if type(policy).__repr__ is object.__repr__ else repr(policy)
