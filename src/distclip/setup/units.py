"""Which units (the weights into one output) of a parameter this rank holds, for policies that scale
by units."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from distclip.errors import PlacementError
from distclip.records import ParamPiece
from distclip.setup.placement import is_copy
from distclip.torch_internals.dtensor import is_contiguous_shard, offset_of, spec_of


class UnitRange(NamedTuple):
    """Of a parameter's units (the indices of its first dimension, or one unit where it has no
    second) those that a piece holds."""

    first: int
    held: int
    cut: bool  # other ranks hold other parts of the same units
    whole: int  # the whole parameter's


def unit_range(param: Tensor, piece: ParamPiece) -> UnitRange:
    """PlacementError where units are sharded in a way that distclip does not know."""
    vector = len(piece.shape) < 2
    whole = 1 if vector else piece.shape[0]
    held = 1 if vector else piece.local_shape[0]
    if "flat " in piece.holding.region:
        raise PlacementError(
            f"{piece.name} is {piece.holding.description}, which cuts units anywhere; "
            f"clip by units under fully_shard (FSDP2)"
        )
    spec = spec_of(param)
    dims = (
        set[int]()
        if spec is None
        else {p.dim % max(1, len(piece.shape)) for p in spec.placements if not is_copy(p)}
    )
    if not (dims if vector else dims - {0}):
        return UnitRange(0, held, False, whole)
    if vector or spec is None:
        return UnitRange(0, 1, True, whole)
    if any(not (is_copy(p) or is_contiguous_shard(p)) and p.dim == 0 for p in spec.placements):
        raise PlacementError(
            f"{piece.name} is {piece.holding.description}; clipping by units does not "
            f"know which rows these are"
        )
    return UnitRange(offset_of(piece.shape, spec)[0], held, True, whole)
