"""What a policy is: two pure functions. Equal inputs on all ranks, so equal decisions, without a
second message."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from distclip.errors import ConfigError
from distclip.kernels.tensor_list import TensorList
from distclip.records import Clamp, Norms, Scale, UnitScale


class Policy(Protocol):
    """`init` makes the state, `decide` turns norms and state into a decision and the next state.

    State is any (named) tuple of tensors, empty if there is none. Both must be pure, must not read
    tensors on the host, and must answer for [groups] groups at once. A step that is not finite
    never reaches the state.
    """

    def init(self, groups: int, device: torch.device) -> tuple[Tensor, ...]: ...

    def decide(
        self, norms: Norms, state: Any
    ) -> tuple[Scale | Clamp | UnitScale, tuple[Tensor, ...]]: ...


@dataclass(frozen=True, slots=True)
class LocalGrads:
    """What this rank holds of a policy's groups at one step: n gradient tensors."""

    grads: TensorList  # [n], not unscaled; its `tensors` are plain and local
    group: Tensor  # [n] int64: which of the policy's groups
    share: Tensor  # [n] float64: what each counts here, 1/h
    scale: Tensor  # [n] float64: the factor that unscales each
    groups: int  # the policy's
    norm_type: float

    def reduced(self, values: Tensor) -> Tensor:
        """[n, num_stats] → [groups, num_stats]: added up, each by its share; the largest where p is
        inf."""
        out = torch.zeros(self.groups, values.shape[1], dtype=torch.float64, device=values.device)
        if math.isinf(self.norm_type):
            return out.scatter_reduce_(0, self.group.unsqueeze(1).expand_as(values), values, "amax")
        return out.index_add_(0, self.group, values * self.share.unsqueeze(1))


@runtime_checkable
class LocalStats(Protocol):
    """A policy that needs more of the gradients than their norm: its numbers travel in the same
    message."""

    num_stats: int  # numbers per group

    def local_stats(self, own: LocalGrads) -> Tensor:
        """This rank's addends: [groups, num_stats] float64 on the groups' device, reduced by SUM
        (by MAX for p = inf).

        `decide` finds their sums in `Norms.stats`, rounded as norms are: a count up to 2^24 comes
        out whole, though shares of 1/h need not add up to it exactly; differences of sums that
        nearly cancel have no more than float32's digits.
        """
        ...


@runtime_checkable
class UnitPolicy(Protocol):
    """A policy that scales by units (the weights into one output)."""

    def unit_coefs(self, weight: Tensor, grad: Tensor) -> Tensor:
        """[units] float64, from the 2-norms of each unit's weights and gradients."""
        ...


def is_policy(thing: Any) -> bool:
    """Whether it is an object with `init` and `decide`; a class is not."""
    return not isinstance(thing, type) and hasattr(thing, "init") and hasattr(thing, "decide")


def describe(policy: Any) -> str:
    """A text that is equal on all ranks for equal policies.

    Raises:
        ConfigError: its `__repr__` fails.
    """
    kind = type(policy)
    if kind.__repr__ is object.__repr__:
        return kind.__qualname__
    try:
        return repr(policy)
    except ConfigError:  # of a policy inside it
        raise
    except Exception as error:
        raise ConfigError(
            f"the repr() of a {kind.__qualname__} fails ({type(error).__name__}: {error}); ranks "
            "compare policies and groupings by it, and checkpoints name them so. Mend its "
            "__repr__, or leave it out: then its class counts"
        ) from error


def shown(policy: Any) -> str:
    """The same where nothing is compared: the class's name where `__repr__` fails."""
    try:
        return describe(policy)
    except ConfigError:
        return f"{type(policy).__qualname__}(repr fails)"
