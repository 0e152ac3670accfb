"""Norms of units (the weights into one output), for policies that scale each unit by a
coefficient of its own.

The coefficient of a unit that is whole on a rank is computed there, before the exchange. For a unit
that is split over ranks, the sums of squares of weights and of gradients are part of the step's
message, at a place agreed at set-up, so that every rank computes the same coefficient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distclip.errors import GradientError
from distclip.exchange.channel import Channel
from distclip.kernels.reference import compute_dtype
from distclip.kernels.tensor_list import TensorList
from distclip.measure.collect import GradientSet
from distclip.p_norm import rounded
from distclip.policies.policy import UnitPolicy
from distclip.setup.plan import Plan
from distclip.setup.units import UnitRange
from distclip.torch_internals.dtensor import local_tensor
from distclip.values import Flag, Number, select_column

_CHUNK = 1 << 20  # elements: bounds float64 copies


@dataclass(frozen=True, slots=True)
class UnitMeasurement:
    """One step's units."""

    # [groups, 2] float64: units that are clipped, and Σ (coef · |g|)², of whole units on this rank
    table: Tensor
    words: Tensor  # [2, cut units] float64: this rank's part of Σw² and Σg²
    coefs: dict[int, Tensor]  # piece → [its units], of whole ones


class UnitClipper:
    """Prepared at set-up. Building one is a collective if any rank has such pieces; all ranks know
    by their rules.

    Args:
        params: [pieces].
        ranges: [pieces]: None where a piece's group is not scaled by units.
        rules: group → its policy.
        bits: of the norms that the rules see.
    """

    def __init__(
        self,
        channel: Channel,
        plan: Plan,
        params: Sequence[Tensor],
        ranges: Sequence[UnitRange | None],
        rules: Mapping[int, UnitPolicy],
        bits: int,
        device: torch.device,
    ) -> None:
        self._plan, self._params, self._ranges = plan, params, ranges
        self._rules, self._bits, self.device = rules, bits, device
        sizes = torch.zeros(2, plan.slots, dtype=torch.int64, device="cpu")
        for i, span in enumerate(ranges):
            if span is not None and span.cut:
                sizes[:, plan.slot_of[i]] = torch.tensor(
                    [span.whole, plan.group_of[i]], device="cpu"
                )
        sizes = channel.all_reduce_(
            sizes.to(channel.comm_device(device)), "max", "the set-up's count of units"
        ).cpu()
        starts = (sizes[0].cumsum(0) - sizes[0]).tolist()
        self._start = [starts[slot] for slot in plan.slot_of]
        self._group = sizes[1].repeat_interleave(sizes[0]).to(device)  # [cut units]
        self.num_split = int(sizes[0].sum())

    def measure_units(
        self, grad_set: GradientSet, grads: TensorList, scale: Tensor
    ) -> UnitMeasurement:
        """Never communicates, reads nothing on the host. `scale`: float64 [own gradients], the
        factor that unscales each."""
        table = torch.zeros(len(self._plan.groups), 2, dtype=torch.float64, device=self.device)
        words = torch.zeros(2, self.num_split, dtype=torch.float64, device=self.device)
        coefs: dict[int, Tensor] = {}
        for i, grad, factor in zip(grad_set.unique, grads.tensors, scale.unbind(), strict=True):
            span = self._ranges[i]
            if span is None:
                continue
            if i in grad_set.misplaced:
                raise GradientError(
                    f"the gradient of {self._plan.pieces[i].name} is placed otherwise than its "
                    f"parameter, and units are rows of the "
                    "parameter's part; before clipping: p.grad = "
                    "p.grad.redistribute(placements=p.placements)"
                )
            share, group = 1 / self._plan.shares[i].num_replicas, self._plan.group_of[i]
            squares = _unit_squares(grad, span.held).to(self.device) * factor.square()
            if span.cut:
                words[1, self._words_of(i, span)] += squares * share
                continue
            weights = _unit_squares(local_tensor(self._params[i].detach()), span.held).to(
                self.device
            )
            norms = rounded(squares.sqrt(), self._bits)
            coef = coefs[i] = self._rules[group].unit_coefs(
                rounded(weights.sqrt(), self._bits), norms
            )
            table[group] += share * torch.stack([(coef < 1).sum(), (coef * norms).square().sum()])
        # also of a part without a gradient: the unit is as large as all its parts
        for i, span in enumerate(self._ranges):
            if span is not None and span.cut and self._params[i].requires_grad:
                weights = _unit_squares(local_tensor(self._params[i].detach()), span.held).to(
                    self.device
                )
                words[0, self._words_of(i, span)] += weights / self._plan.shares[i].num_replicas
        return UnitMeasurement(table, words, coefs)

    def _words_of(self, i: int, span: UnitRange) -> slice:
        return slice(self._start[i] + span.first, self._start[i] + span.first + span.held)

    def combine_split(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """From the reduced words [2, cut units]: their coefficients [cut units], and their addends
        to the table, [groups, 2]."""
        weights, grads = rounded(words.sqrt(), self._bits).unbind()
        coefs = torch.ones_like(grads)
        for group, rule in self._rules.items():
            coefs = torch.where(self._group == group, rule.unit_coefs(weights, grads), coefs)
        both = torch.stack([(coefs < 1).double(), (coefs * grads).square()], dim=1)
        table = torch.zeros(len(self._plan.groups), 2, dtype=torch.float64, device=self.device)
        return coefs, table.index_add_(0, self._group, both)

    def scale_units_(
        self,
        grad_set: GradientSet,
        grads: TensorList,
        measured: UnitMeasurement,
        split_coefs: Tensor,
        finite: Flag,
        factors: Sequence[Number],
    ) -> None:
        """Multiply in place, each unit by its coefficient and each gradient by its factor, at
        float32 or better."""
        own = zip(grad_set.unique, grads.tensors, factors, strict=True)
        for i, grad, factor in own:
            span = self._ranges[i]
            if span is None:
                continue
            coefs = split_coefs[self._words_of(i, span)] if span.cut else measured.coefs[i]
            coefs = select_column(finite, coefs, 1.0)
            assert isinstance(coefs, Tensor)
            shape = [-1] + [1] * (grad.ndim - 1) if grad.ndim else []
            by = (coefs * factor).to(grad.device, compute_dtype(grad.dtype)).view(shape)
            if grad.dtype in (torch.bfloat16, torch.float16):
                grad.copy_(grad.to(by.dtype).mul_(by))
            else:
                grad.mul_(by)


def _unit_squares(tensor: Tensor, units: int) -> Tensor:
    """[units] float64 sums of squares of a local tensor whose first dimension is its units', or
    that is one unit.

    Raises:
        GradientError: a sparse tensor.
    """
    if tensor.is_sparse:
        raise GradientError(
            f"a sparse gradient of shape {tuple(tensor.shape)} cannot be scaled by units; exempt "
            f"it by "
            "groups=by_name({...: Exempt()}), or use sparse=False"
        )
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    rows = tensor.reshape(units, -1) if tensor.numel() else tensor.new_zeros(units, 0)
    return torch.cat(
        [
            chunk.double().square().sum(1)
            for chunk in rows.split(max(1, _CHUNK // max(1, rows.shape[1])))
        ]
    )
