"""Policies' states side by side: chosen, copied, sent to another device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

State = tuple[tuple[Tensor, ...], ...]


def select_state(old: State, new: State, finite: Tensor) -> State:
    """The new state where the step was finite, else the old one: selected, never multiplied."""
    return tuple(
        _like(before, (torch.where(finite, n, o) for o, n in zip(before, now, strict=True)))
        for before, now in zip(old, new, strict=True)
    )


def clone_state(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Clones, in a named tuple of the same kind where it is one."""
    return _like(state, (t.clone() for t in state))


def moved(states: State, device: torch.device) -> State:
    """The same on another device."""
    return tuple(_like(state, (t.to(device) for t in state)) for state in states)


def _like(state: tuple[Tensor, ...], values: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return getattr(state, "_make", tuple)(values)
