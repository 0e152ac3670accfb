"""What a policy returns, checked: a wrong shape would be spread over all groups, a wrong dtype
cast, both silently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from distclip.errors import ConfigError
from distclip.policies import Escalate, SkipSpikes, Warmup
from distclip.policies.assignment import PolicyAssignment
from distclip.policies.policy import Policy, UnitPolicy, describe
from distclip.policies.state import clone_state
from distclip.records import ACTIONS, Clamp, Norms, Scale, UnitScale

_NUMBERS = {  # the float64 fields of each answer; `clipped` is bool
    Scale: ("coef", "threshold"),
    Clamp: ("value", "norm_after", "cosine"),
    UnitScale: ("threshold", "norm_after"),
}


def initial_state(policy: Any, groups: int, device: torch.device) -> tuple[Tensor, ...]:
    """What `init` makes, copied, since it is written in place.

    Raises:
        ConfigError: it is no tuple of tensors.
    """
    if isinstance(policy, (Escalate, Warmup, SkipSpikes)):
        # theirs holds it flat, in which a wrong one may pass
        initial_state(policy.policy, groups, device)
    made = policy.init(groups, device)
    if not isinstance(made, tuple) or not all(isinstance(t, Tensor) for t in made):
        raise ConfigError(
            f"{describe(policy)}: init() returned {_kind_of(made)}; return a tuple of tensors, () "
            f"where there is nothing to remember"
        )
    return clone_state(made)


def validate_policy(policy: Policy, norms: Norms, state: tuple[Tensor, ...]) -> None:
    """Call `decide` once, at set-up, and check that the answer is what `Policy` and the records
    define. Reads no tensor.

    Raises:
        ConfigError: an answer or a state of another kind, shape, dtype or device.
    """
    _check_policy(policy, norms, state)


def _check_policy(policy: Any, norms: Norms, state: tuple[Tensor, ...]) -> None:
    groups, device = len(norms.per_group), norms.per_group.device
    # they spread what their policy answers over all groups, whatever its shape
    if isinstance(policy, (Escalate, Warmup, SkipSpikes)):
        _check_policy(policy.policy, norms, initial_state(policy.policy, groups, device))
    who, answers = describe(policy), "distclip.Scale, Clamp or UnitScale"
    for j, tensor in enumerate(state):
        if tensor.device != device:
            raise ConfigError(
                f"{who}: init() made state[{j}] on {tensor.device}; make it on "
                f"{device}, the device it is given"
            )
    # a copy: one that writes to its state, though it should not, is to begin where `init` left it
    given = policy.decide(norms, clone_state(state))
    if not isinstance(given, tuple) or len(given) != 2:
        raise ConfigError(
            f"{who}: decide() returned {_kind_of(given)}; return two things, a "
            f"{answers} and the next state"
        )
    answer, new = cast("tuple[Any, ...]", given)
    record = next((record for record in _NUMBERS if isinstance(answer, record)), None)
    if record is None:
        raise ConfigError(
            f"{who}: decide() returned {_kind_of(answer)} as its answer; return a {answers}"
        )
    if isinstance(answer, UnitScale) and not isinstance(policy, UnitPolicy):
        raise ConfigError(
            f"{who}: decide() returned a UnitScale, but there is no unit_coefs to "
            f"scale by; return a Scale or a Clamp"
        )
    name = record.__name__
    wanted = dict.fromkeys(_NUMBERS[record], torch.float64) | (
        {} if record is Scale else {"clipped": torch.bool}
    )
    for field, dtype in wanted.items():
        value = getattr(answer, field)
        if _kind_of(value) != (kind := _tensor_kind(dtype, (groups,), device)):
            raise ConfigError(
                f"{who}: decide() returned {name}.{field} as {_kind_of(value)}; return "
                f"{kind}, an entry for each of its groups"
            )
    kinds = [_tensor_kind(torch.bool, shape, device) for shape in ((), (groups,))]
    if answer.skip is not None and _kind_of(answer.skip) not in kinds:
        raise ConfigError(
            f"{who}: decide() returned {name}.skip as {_kind_of(answer.skip)}; return "
            f"{' or '.join(kinds)}, or None"
        )
    if answer.action is not None and _kind_of(answer.action) != (
        kind := _tensor_kind(torch.int64, (), device)
    ):
        raise ConfigError(
            f"{who}: decide() returned {name}.action as {_kind_of(answer.action)}; return {kind}, "
            f"a place in {ACTIONS}, or None"
        )
    if not isinstance(new, tuple) or len(new) != len(state):
        raise ConfigError(
            f"{who}: decide() returned {_kind_of(new)} as the next state, and init() "
            f"{_kind_of(state)}; "
            f"return a tuple of as many tensors"
        )
    for j, (old, value) in enumerate(zip(state, cast("tuple[Any, ...]", new), strict=True)):
        if _kind_of(value) != _kind_of(old):
            raise ConfigError(
                f"{who}: decide() returned state[{j}] as {_kind_of(value)}, and init() "
                f"made it {_kind_of(old)}; return the same"
            )


def validate_stats(part: PolicyAssignment, given: Any) -> Tensor:
    """[groups · words]: what `local_stats` returned, flat. ConfigError for another shape, which
    assignment would spread silently."""
    if not isinstance(given, Tensor) or given.shape != (len(part.groups), part.num_stats):
        raise ConfigError(
            f"{describe(part.policy)}: local_stats() returned {_kind_of(given)}; return [groups, "
            f"words], here {[len(part.groups), part.num_stats]}"
        )
    return given.flatten()


def _kind_of(value: Any) -> str:
    """A description for error messages."""
    if isinstance(value, Tensor):
        return _tensor_kind(value.dtype, value.shape, value.device)
    if isinstance(value, tuple):
        entries = ", ".join(type(entry).__name__ for entry in cast("tuple[Any, ...]", value))
        return f"a tuple ({entries})"
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _tensor_kind(dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)} on {device}"
