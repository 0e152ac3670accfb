"""Stage 6d: what a clipper remembers from step to step. Tensors are written in place: the replays
of a captured graph find there what the one before left."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from distclip.decide.decision import StepFlags
from distclip.decide.history import History, empty
from distclip.policies.state import State, clone_state, moved, select_state
from distclip.records import Decision


class ClipperState:
    """Equal on all ranks.

    Args:
        groups: the names that the state belongs to.
        first: the policies' states at the start.
        mixers: [2, groups] int64, of the token.
        step: calls so far.
    """

    def __init__(
        self, groups: tuple[str, ...], first: State, mixers: Tensor, step: int = 0
    ) -> None:
        self.groups, self.state, self.step = groups, first, step
        self.taken = 0  # calls that `history` counts: neither passive nor an error
        self.history = empty(mixers.device)
        self.rate = self.history.rate
        self._mixers = mixers
        # token of the last decision
        self._last = torch.zeros(1, dtype=torch.float64, device=mixers.device)

    def moved(self, mixers: Tensor) -> ClipperState:
        """The same for a new plan of the same groups, perhaps on another device."""
        there = ClipperState(self.groups, moved(self.state, mixers.device), mixers, self.step)
        there.load(self.step, self.history, there.state)
        return there

    def last(self, reads: bool) -> Tensor | float:
        """The token of the decision before. Where it may not be read, a copy: what travels must
        outlast the next write."""
        return float(self._last) if reads else self._last.clone()

    def states(self) -> State:
        """Copies for policies: an answer may hold on to its state, and is put to use after
        `remember`."""
        return tuple(map(clone_state, self.state))

    def remember(
        self, decision: Decision, state: State, will: StepFlags, fine: bool | None, reads: bool
    ) -> None:
        """One more step that is not passive.

        Args:
            state: the policies' next one; it stays where the step is not taken.
            fine: whether the step is finite and taken, None where the host does not know.
            reads: whether the host may read what it wants.
        """
        self.taken += 1
        # a hash of the bits
        token = (
            torch.stack([decision.coef, decision.threshold]).view(torch.int64) * self._mixers
        ).sum()
        if reads:
            self.rate.fill_(self.history.record_here_(bool(will.clipped), bool(will.skipped)))
            self._last.fill_(_middle(int(token)))
        else:
            self.rate.copy_(self.history.record_(will.clipped, will.skipped))
            self._last.copy_(_middle(token))
        if fine is None and any(state):
            self._keep(select_state(self.state, state, will.go & ~will.skipped))
        elif fine:
            self._keep(state)

    def load(self, step: int, history: History, state: State) -> None:
        self.step = step
        for tensor, value in zip(self.history, history, strict=True):
            tensor.copy_(value)
        self._keep(state)
        self.rate.copy_(self.history.rate)
        self.taken = int(history.calls)

    def _keep(self, state: State) -> None:
        for tensor, value in zip(
            chain.from_iterable(self.state), chain.from_iterable(state), strict=True
        ):
            tensor.copy_(value)


def _middle(bits: Any) -> Any:
    """16 bits of a sum that depend on all bits below: of a number, or of a tensor of them."""
    return bits >> 40 & 0xFFFF
