"""What is done to this rank's gradients: one multiply each, none where the factor is 1; clamps
after it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distclip.decide.decision import ClipDecision, StepStatus
from distclip.errors import DistclipError
from distclip.kernels.step_kernels import FixedStep
from distclip.kernels.tensor_list import TensorList
from distclip.measure.collect import GradientSet
from distclip.measure.units import UnitClipper, UnitMeasurement
from distclip.records import ClipReport
from distclip.request import Request
from distclip.setup.plan import Plan
from distclip.values import Column, Flag, Number, as_tensor, fill, multiply, select_column


class StepOutcome(NamedTuple):
    """What a call is to do to the gradients."""

    request: Request
    decision: ClipDecision
    finite: Flag
    status: StepStatus
    on_host: bool  # all of this is Python's: read at once, or in one go before anything is touched
    grad_set: GradientSet
    grads: TensorList | None  # of the set's `unique` pieces; None where nothing is to be touched
    units: UnitMeasurement | None  # None too where something is wrong on this rank
    split_unit_coefs: Tensor | None  # [units that are split over ranks] float64
    report: ClipReport
    ready: FixedStep | None = None  # what the device's kernel has worked out; None: it did not
    error: DistclipError | None = None  # raised once the report is written; nothing is applied

    @property
    def coefs(self) -> Column:
        """[groups], 1 where the step is not finite."""
        if self.ready is not None:
            return self.ready.applied
        coef = self.decision.coef
        return coef if self.finite is True else select_column(self.finite, coef, 1.0)

    @property
    def is_skipped(self) -> bool:
        """Known to be: nothing is to be done."""
        return self.on_host and bool(self.status.skipped)


@dataclass(slots=True)
class GradientApplier:
    """Prepared at set-up."""

    plan: Plan
    units: UnitClipper | None
    device: torch.device

    def fused_divisor(self, outcome: StepOutcome, group: int, scaled: bool) -> Tensor | None:
        """[] float32: what an optimizer divides its gradients by, or None where that is known to
        be 1.

        Args:
            scaled: they still carry the loss scale.
        """
        if outcome.ready is not None and outcome.request.grad_scale == 1:
            return outcome.ready.divisors[scaled][group]
        factor = outcome.coefs[group] * outcome.request.factor(scaled)
        if not isinstance(factor, Tensor):
            if factor == 1:
                return None
            factor = torch.tensor(factor, dtype=torch.float64, device=self.device)
        return factor.reciprocal().to(torch.float32)

    def fused_stop(self, outcome: StepOutcome) -> Tensor | None:
        """[] float32: above 0 where an optimizer is to move nothing; None where the step is known
        to be taken."""
        if outcome.on_host:
            return None
        if outcome.ready is not None:
            return outcome.ready.stop
        skipped = outcome.status.skipped
        assert isinstance(skipped, Tensor)
        return skipped.float()

    def apply_(self, outcome: StepOutcome, fused_pieces: frozenset[int] = frozenset()) -> None:
        """In place. `fused_pieces` are left to their optimizers."""
        request, decision, grads = outcome.request, outcome.decision, outcome.grads
        acts = not outcome.on_host or bool(outcome.status.clipped)
        # nothing is clipped, and `grad_scale` may undo the loss scale: they stay as they are
        stay = not acts and (request.leaves_grads or request.common_factor == 1)
        if not (stay or grads is None or fused_pieces.issuperset(outcome.grad_set.unique)):
            factors = self._factors(outcome, fused_pieces)
            # each unit by its own coefficient: then these gradients are done
            if decision.unitwise and acts and outcome.units is not None:
                factors = self._scale_units(outcome, grads, factors)
            # one multiply for the coefficient, the loss scale and grad_scale together
            grads.scale_(factors)
            # elements are bounded after unscaling
            if decision.clamped and acts:
                self._clamp(outcome, grads)
        # what optimizers step beside what is clipped is only unscaled
        inv_scale = request.scaler.inv_scale
        if inv_scale is not None and (others := request.unmanaged_grads()):
            scale = inv_scale.expand(len(others)) if isinstance(inv_scale, Tensor) else inv_scale
            TensorList.of(others).scale_(scale)

    def _factors(self, outcome: StepOutcome, fused_pieces: frozenset[int]) -> Any:
        """A number for all gradients, or [unique] numbers, or float64 [unique] on the device."""
        request, coefs, grad_set = outcome.request, outcome.coefs, outcome.grad_set
        groups = grad_set.groups
        common = 1.0 if request.leaves_grads else request.common_factor
        if isinstance(coefs, list) and common is not None and not fused_pieces:
            first = coefs[0]
            if coefs.count(first) == len(coefs):
                return first * common
        per_grad: Column
        if isinstance(coefs, Tensor):
            alone = coefs.numel() == 1  # a view, in place of a launch
            per_grad = coefs.expand(len(groups)) if alone else coefs[grad_set.group_index]
        else:
            per_grad = [coefs[group] for group in groups]
        scales = request.grad_factors(grad_set.unique)
        is_plain = not isinstance(common, Tensor) and common == 1
        if is_plain and isinstance(per_grad, Tensor) and not fused_pieces:
            return per_grad
        if isinstance(scales, list):
            scales = fill(per_grad, scales[0]) if common is not None else scales
        if isinstance(per_grad, Tensor) and isinstance(scales, list):
            scales = as_tensor(scales, torch.float64, per_grad.device)
        if isinstance(per_grad, list) and isinstance(scales, Tensor):
            per_grad = as_tensor(per_grad, torch.float64, scales.device)
        factors = multiply(per_grad, scales)
        if not fused_pieces:
            return factors
        if isinstance(factors, Tensor):
            mask = grad_set.mask_of(fused_pieces, factors.device)
            return torch.where(mask, 1.0, factors)
        pieces = zip(grad_set.unique, factors, strict=True)
        return [1.0 if i in fused_pieces else factor for i, factor in pieces]

    def _scale_units(self, outcome: StepOutcome, grads: TensorList, factors: Any) -> Any:
        """Scales the gradients that have a coefficient for each unit; the factors for the
        others."""
        assert self.units is not None and outcome.units is not None
        grad_set, unitwise = outcome.grad_set, outcome.decision.unitwise
        each: Sequence[Number] = (
            [factors] * len(grad_set.unique) if isinstance(factors, (int, float)) else list(factors)
        )
        assert outcome.split_unit_coefs is not None
        self.units.scale_units_(
            grad_set, grads, outcome.units, outcome.split_unit_coefs, outcome.finite, each
        )
        done = [group in unitwise for group in grad_set.groups]
        if isinstance(factors, Tensor):
            return torch.where(torch.tensor(done, device="cpu").to(factors.device), 1.0, factors)
        return [1.0 if was else factor for was, factor in zip(done, each, strict=True)]

    def _clamp(self, outcome: StepOutcome, grads: TensorList) -> None:
        grad_set, clamped = outcome.grad_set, outcome.decision.clamped
        threshold = as_tensor(outcome.decision.threshold, torch.float64, self.device)
        if isinstance(outcome.finite, Tensor):
            threshold = torch.where(outcome.finite, threshold, torch.inf)
        elif not outcome.finite:
            return
        bounds = threshold[grad_set.group_index]
        if len(clamped) == len(self.plan.groups):
            grads.clamp_(bounds)
            return
        mine = [n for n, group in enumerate(grad_set.groups) if group in clamped]
        at = torch.tensor(mine, dtype=torch.int64, device="cpu").to(bounds.device)
        TensorList.of([grads.tensors[n] for n in mine]).clamp_(bounds[at])


def drop_step_grads(request: Request, members: Sequence[Tensor]) -> None:
    """A skipped step's gradients: the clipper's, and all others of the optimizers that were
    given."""
    drop_grads([*members, *(p for owned in request.optimizers for p in owned.unclipped_params)])


def drop_grads(params: Iterable[Tensor]) -> None:
    """Set `.grad` to None: every optimizer leaves a parameter without one alone, its state and
    counters too (zeros would not)."""
    for param in params:
        param.grad = None
