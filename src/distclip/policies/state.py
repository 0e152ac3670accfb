"""Policies' states side by side: selected, cloned, sent to another device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from distclip.values import Flag

State = tuple[tuple[Tensor, ...], ...]


def select_state(taken: Flag, old: State, new: State, observed: Sequence[int] = ()) -> State:
    """The new state where the step was taken, else the old one: selected, never multiplied.

    Args:
        observed: of each state so many tensors, the first, are new in any case; () is none.
    """
    if not isinstance(taken, Tensor) and (taken or not any(observed)):
        return new if taken else old

    def chosen(o: Tensor, n: Tensor) -> Tensor:
        return torch.where(taken, n, o) if isinstance(taken, Tensor) else o

    return tuple(
        _of_kind(
            before,
            (n if i < count else chosen(o, n) for i, (o, n) in enumerate(zip(before, now))),
        )
        for before, now, count in zip(old, new, observed or [0] * len(old), strict=True)
    )


def clone_state(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Clones, in a named tuple of the same kind where it is one."""
    return _of_kind(state, (t.clone() for t in state))


def state_to(states: State, device: torch.device) -> State:
    """The same on another device."""
    return tuple(_of_kind(state, (t.to(device) for t in state)) for state in states)


def _of_kind(state: tuple[Tensor, ...], values: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return getattr(state, "_make", tuple)(values)
