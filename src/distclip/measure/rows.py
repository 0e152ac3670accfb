"""Gradients that watched layers cut along their first dimension: power sums of the rows, from which
the pieces' own follow, so that nothing is read twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distclip.errors import GradientError
from distclip.kernels.tensor_list import TensorList
from distclip.measure.collect import GradientSet
from distclip.p_norm import PNorm
from distclip.setup.plan import Plan

_REMEMBERED = 8  # sets of gradients that are there, as the collector remembers them


class _RowPlaces(NamedTuple):
    """Where the rows of one set of gradients belong; int64 on the compute device."""

    owner: Tensor  # [rows] which of the set's gradients; one that is not cut is one row
    part: Tensor  # [rows] which of all parts


class RowSums:
    """Prepared at set-up, where some piece of this rank is cut."""

    def __init__(self, plan: Plan, norm: PNorm, device: torch.device) -> None:
        self._pieces, self._rows, self._norm = plan.pieces, plan.layer_rows, norm
        self._first: list[int] = []  # [pieces] its first part
        self.num_parts = 0
        for rows in plan.layer_rows:
            self._first.append(self.num_parts)
            self.num_parts += 1 if rows is None else rows
        self._device = device
        self._places: dict[tuple[int, ...], _RowPlaces] = {}

    def split(self, grad_set: GradientSet, grads: TensorList) -> TensorList:
        """The gradients, in the place of each that is cut its rows.

        Raises:
            GradientError: one that is cut is sparse, or placed otherwise than its parameter.
        """
        out: list[Tensor] = []
        for i, tensor in zip(grad_set.unique, grads.tensors, strict=True):
            if self._rows[i] is None:
                out.append(tensor)
                continue
            if tensor.is_sparse or i in grad_set.misplaced:
                kind = "sparse" if tensor.is_sparse else "placed otherwise than its parameter"
                raise GradientError(
                    f"the gradient of {self._pieces[i].name} is {kind}, and per_expert cuts it "
                    f"into the parameter's rows; leave it out of the pattern"
                )
            out += tensor.unbind()
        return TensorList.of(out)

    def owner_of(self, unique: Sequence[int]) -> Tensor:
        """[rows] int64: to which of the gradients each row of `split` belongs."""
        return self._places_of(unique).owner

    def of_grads(self, rows: Tensor, unique: Sequence[int]) -> Tensor:
        """[unique]: the power sums of whole gradients. `rows`: [rows] float64."""
        sums = rows.new_zeros(len(unique))
        owner, reduce = self.owner_of(unique), self._norm.reduce_op
        return sums.scatter_reduce_(0, owner, rows, "amax" if reduce == "max" else "sum")

    def in_places(self, rows: Tensor, unique: Sequence[int]) -> Tensor:
        """[parts]: each row in its part's place, 0 elsewhere."""
        return rows.new_zeros(self.num_parts).index_copy_(0, self._places_of(unique).part, rows)

    def _places_of(self, unique: Sequence[int]) -> _RowPlaces:
        key = tuple(unique)
        if key not in self._places:
            if len(self._places) >= _REMEMBERED:
                self._places.clear()
            owner: list[int] = []
            part: list[int] = []
            for n, i in enumerate(key):
                rows = self._rows[i]
                count = 1 if rows is None else rows
                owner += [n] * count
                part += range(self._first[i], self._first[i] + count)
            self._places[key] = _RowPlaces(*(self._to_device(each) for each in (owner, part)))
        return self._places[key]

    def _to_device(self, index: list[int]) -> Tensor:
        return torch.tensor(index, dtype=torch.int64, device="cpu").to(self._device)
