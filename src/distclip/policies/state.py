"""Policies' states side by side: selected, cloned, sent to another device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from distclip.values import Flag

State = tuple[tuple[Tensor, ...], ...]


def select_state(taken: Flag, old: State, new: State) -> State:
    """The new state where the step was taken, else the old one: selected, never multiplied."""
    if not isinstance(taken, Tensor):
        return new if taken else old
    return tuple(
        _of_kind(before, (torch.where(taken, n, o) for o, n in zip(before, now, strict=True)))
        for before, now in zip(old, new, strict=True)
    )


def clone_state(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Clones, in a named tuple of the same kind where it is one."""
    return _of_kind(state, (t.clone() for t in state))


def state_to(states: State, device: torch.device) -> State:
    """The same on another device."""
    return tuple(_of_kind(state, (t.to(device) for t in state)) for state in states)


def _of_kind(state: tuple[Tensor, ...], values: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return getattr(state, "_make", tuple)(values)
