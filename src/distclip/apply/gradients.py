"""Stage 7c: what is done to this rank's gradients: one multiply each, none where the factor is 1;
clamps after it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from distclip.kernels.tensor_list import TensorList
from distclip.measure.collect import Grads, Present
from distclip.measure.units import Units, UnitStep
from distclip.records import ClipReport, Decision
from distclip.request import Request
from distclip.setup.plan import Plan


class HostDecision(NamedTuple):
    """What the host has read of an outcome."""

    coefs: list[float]  # [groups]
    inverse: float  # of the scaler's scale
    acts: bool  # some coefficient is not 1, some element or unit is clipped
    skip: bool
    fine: bool  # finite and taken


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call is to do to the gradients."""

    decision: Decision
    grads: Grads
    finite: Tensor  # [] bool
    stop: Tensor  # [] bool: no optimizer may move
    # [] bool: what a scaler is told; a step that a policy leaves out is no overflow
    overflow: Tensor
    cut: Tensor  # [cut units] float64: coefficients of units that are cut over ranks
    units: UnitStep | None
    known: HostDecision | None  # None where the host has not read anything
    report: ClipReport

    def coef(self) -> Tensor:
        """[groups] float64."""
        return torch.where(self.finite, self.decision.coef, 1.0)


@dataclass(slots=True)
class GradientApplier:
    """Prepared at set-up."""

    plan: Plan
    units: Units | None
    group: Tensor  # [pieces] int64 on the compute device
    _folded: tuple[Present, frozenset[int], Tensor] | None = field(init=False, default=None)
    _own: tuple[Present, list[int], Tensor] | None = field(init=False, default=None)

    def folded_factor(
        self, call: Request, outcome: Outcome, group: int, scaled: bool
    ) -> Tensor | None:
        """[] float64: what an optimizer multiplies its gradients by, or None where that is known to
        be 1."""
        known = outcome.known
        if (
            known is not None
            and known.coefs[group] * (known.inverse if scaled else 1.0) * call.grad_scale == 1
        ):
            return None
        return outcome.coef()[group] * (
            call.inverse * call.grad_scale if scaled else call.grad_scale
        )

    def act(self, call: Request, outcome: Outcome, folded: frozenset[int]) -> None:
        """In place. `folded` pieces are left to their optimizers."""
        decision, grads = outcome.decision, outcome.grads
        if not folded.issuperset(grads.present.own):
            if outcome.known is not None:
                factors = self._known_factors(call, outcome.known, grads.present, folded)
            else:
                factors = self._device_factors(call, outcome, grads.present, folded)
            if decision.unitwise and (outcome.known is None or outcome.known.acts):
                factors = self._unit_factors(outcome, factors, grads)
            grads.list.scale_(factors)
            if decision.clamped and (outcome.known is None or outcome.known.acts):
                self._clamp_(outcome, grads)
        if call.hands.inverse is not None and (others := call.others()):
            TensorList.of(others).scale_(call.hands.inverse.expand(len(others)))

    def _known_factors(
        self, call: Request, known: HostDecision, present: Present, folded: frozenset[int]
    ) -> float | list[float]:
        scale, unscaled = known.inverse * call.grad_scale, call.unscaled()
        if not folded and not unscaled and (len(known.coefs) == 1 or not known.acts):
            return known.coefs[0] * scale if len(known.coefs) == 1 else scale
        groups = self._groups(present)[0]
        factors = [known.coefs[group] * scale for group in groups]
        if folded or unscaled:
            for n, i in enumerate(present.own):
                if i in folded:
                    factors[n] = 1.0
                elif i in unscaled:
                    factors[n] = known.coefs[groups[n]] * call.grad_scale
        return factors

    def _device_factors(
        self, call: Request, outcome: Outcome, present: Present, folded: frozenset[int]
    ) -> Tensor:
        """[own gradients] float64: nothing is read on the host."""
        scale = call.scales(present.own, outcome.finite.device)
        factors = outcome.coef()[self._groups(present)[1]] * scale
        if folded:
            factors = torch.where(self._left(present, folded, factors.device), 1.0, factors)
        return factors

    def _left(self, present: Present, folded: frozenset[int], device: torch.device) -> Tensor:
        """[own gradients] bool: those that optimizers multiply. Sent to the device only when it
        changes."""
        if self._folded is None or self._folded[0] is not present or self._folded[1] != folded:
            self._folded = (
                present,
                folded,
                torch.tensor([i in folded for i in present.own], device="cpu").to(device),
            )
        return self._folded[2]

    def _unit_factors(
        self, outcome: Outcome, factors: float | list[float] | Tensor, grads: Grads
    ) -> list[float] | Tensor:
        """Scales the gradients that have a coefficient for each unit; the factors for the
        others."""
        assert self.units is not None and outcome.units is not None
        count, unitwise = len(grads.present.own), outcome.decision.unitwise
        each: Sequence[float | Tensor] = (
            [factors] * count if isinstance(factors, (int, float)) else list(factors)
        )
        self.units.scale_(grads, outcome.units, outcome.cut, outcome.finite, each)
        done = [group in unitwise for group in self._groups(grads.present)[0]]
        if isinstance(factors, Tensor):
            return torch.where(torch.tensor(done, device="cpu").to(factors.device), 1.0, factors)
        return [1.0 if was else float(factor) for was, factor in zip(done, each, strict=True)]

    def _clamp_(self, outcome: Outcome, grads: Grads) -> None:
        groups, at = self._groups(grads.present)
        clamped = outcome.decision.clamped
        bounds = torch.where(outcome.finite, outcome.decision.threshold, torch.inf)[at]
        if len(clamped) == len(self.plan.groups):
            grads.list.clamp_(bounds)
            return
        mine = [n for n, group in enumerate(groups) if group in clamped]
        TensorList.of([grads.list.tensors[n] for n in mine]).clamp_(
            bounds[torch.tensor(mine, dtype=torch.int64, device="cpu").to(bounds.device)]
        )

    def _groups(self, present: Present) -> tuple[list[int], Tensor]:
        """[own gradients] the groups of the gradients that are there, on the host and on the
        compute device."""
        if self._own is None or self._own[0] is not present:
            at = self.group if present.index is None else self.group[present.index]
            self._own = (present, [self.plan.group_of[i] for i in present.own], at)
        return self._own[1], self._own[2]


def drop_step_grads(call: Request, members: Sequence[Tensor]) -> None:
    """A skipped step's gradients: the clipper's, and all others of the optimizers that were
    given."""
    drop_grads([*members, *(p for owned in call.owned for p in owned.unclipped)])


def drop_grads(params: Iterable[Tensor]) -> None:
    """Take the gradients away: every optimizer leaves a parameter without one alone, its state and
    counters too (zeros would not)."""
    for param in params:
        param.grad = None
