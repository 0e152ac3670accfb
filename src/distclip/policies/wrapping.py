"""What policies that wrap another one have in common: its state inside theirs, its stats."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from distclip.errors import ConfigError
from distclip.policies.policy import Policy, describe, is_policy, shown


class _WrappedState(tuple[Tensor, ...]):
    """A wrapper's tensors and then those of the policy inside, flat as every state is.

    Attributes:
        inner_kind: makes a state of the inner policy's kind, which may be a named tuple.
    """

    inner_kind: Any

    def _make(self, tensors: Iterable[Tensor]) -> _WrappedState:
        """Of the same kind, as named tuples offer it."""
        return _make_wrapped_state(tensors, self.inner_kind)


def _make_wrapped_state(tensors: Iterable[Tensor], inner_kind: Any) -> _WrappedState:
    state = _WrappedState(tensors)
    state.inner_kind = inner_kind
    return state


def wrap_state(
    own: tuple[Tensor, ...], like: tuple[Tensor, ...], inner: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The wrapper's state: its own tensors, then `inner`, which is of the kind of `like`."""
    return _make_wrapped_state((*own, *inner), getattr(like, "_make", tuple))


def inner_state(state: tuple[Tensor, ...], num_own: int) -> tuple[Tensor, ...]:
    """The inner policy's state, behind so many tensors of the wrapper's own."""
    return getattr(state, "inner_kind", tuple)(state[num_own:])


def check_policy(who: str, policy: Any) -> None:
    """ConfigError if it is no policy."""
    if not is_policy(policy):
        raise ConfigError(
            f"{who}: policy={shown(policy)} has no init and decide; pass e.g. "
            "distclip.FixedNorm(1.0)"
        )
    if num_observed(policy):
        raise ConfigError(
            f"{who}: {describe(policy)} counts steps that {who} would hide from it; put it "
            f"outermost: Escalate({who}(...))"
        )


def num_observed(policy: Any) -> int:
    """How many tensors of its state, the first, a policy wants kept at every step that counts, also
    one that is not taken. `decide` sees to it that they take in nothing that is not finite."""
    return int(getattr(policy, "num_observed", 0))


def pass_on_stats(wrapper: Any, policy: Policy) -> None:
    """What the inner policy adds to the message travels under the wrapper's name."""
    for name in ("num_stats", "local_stats", "unit_coefs", "user_threshold"):
        if hasattr(policy, name):
            object.__setattr__(wrapper, name, getattr(policy, name))
