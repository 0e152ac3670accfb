"""Pieces that are cut along their first dimension (fused expert tensors) for watched norms: which
indices a piece holds, and the layers that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from distclip.errors import ConfigError, PlacementError
from distclip.records import ParamPiece
from distclip.setup.placement import is_copy
from distclip.torch_internals.dtensor import is_contiguous_shard, offset_of, spec_of

# between a cut layer's name and its number of indices, while ranks agree on names
_MARK = "\t"


class RowRange(NamedTuple):
    """Of the indices of a parameter's first dimension those that a piece holds, or parts of
    them."""

    first: int
    held: int
    whole: int  # the whole parameter's


def row_range(param: Tensor, piece: ParamPiece) -> RowRange:
    """PlacementError where it cannot be told which they are."""
    if not piece.shape or "flat " in piece.holding.region:
        raise PlacementError(
            f"per_expert: {piece.name} is {piece.holding.description}, of shape {piece.shape}, "
            f"and has no experts along its first dimension here; FSDP1 cuts them anywhere: use "
            f"fully_shard (FSDP2)"
        )
    held, whole, spec = piece.local_shape[0], piece.shape[0], spec_of(param)
    if spec is None:
        return RowRange(0, held, whole)
    sizes = spec.mesh.shape
    across = [
        (placement, sizes[i])
        for i, placement in enumerate(spec.placements)
        if not is_copy(placement) and placement.dim % len(piece.shape) == 0
    ]
    if not all(_is_one_run(p, across[i + 1 :]) for i, (p, _) in enumerate(across)):
        raise PlacementError(
            f"per_expert: {piece.name} is {piece.holding.description}; which experts these are is "
            f"not known"
        )
    return RowRange(offset_of(piece.shape, spec)[0] if across and held else 0, held, whole)


def _is_one_run(placement: Any, later: Iterable[tuple[Any, int]]) -> bool:
    """Whether a rank's part is one run of indices: a Shard, or what FSDP2 makes of it over the
    Shards of later mesh dimensions, which it divides further."""
    factor = getattr(placement, "split_factor", None)
    if factor is None:
        return is_contiguous_shard(placement)
    divided = 1
    for _, size in later:
        divided *= size
    return factor == divided


def cut_name(name: str, count: int) -> str:
    """Under which ranks agree on a layer that is cut into so many, which not all of them hold."""
    return f"{name}{_MARK}{count}"


def cut_layers(
    names: Iterable[str], parameters_under: Callable[[str], set[int]]
) -> tuple[tuple[str, ...], dict[str, int]]:
    """The layers of agreed names, and where those of each name begin.

    Args:
        parameters_under: gives how many different parameters over the ranks bear one name, for
            the names of a layer.

    Raises:
        ConfigError: a layer is cut into different numbers.
    """
    layers: list[str] = []
    start: dict[str, int] = {}
    seen: dict[str, str] = {}
    for name in names:
        start[name] = len(layers)
        base, mark, count = name.partition(_MARK)
        if not mark:
            layers.append(name)
            continue
        if base in seen:
            raise ConfigError(
                f"per_expert: some tensors of {base} have {seen[base]} experts along their first "
                f"dimension, others {count}; let the pattern match those of one number alone"
            )
        seen[base] = count
        several = parameters_under(name)
        if len(several) > 1:
            raise ConfigError(
                f"per_expert: of the tensors of {base} some are different parameters on other "
                f"ranks and some are not; declare replicated_over for all of them"
            )
        total = int(count) * several.pop()
        width = len(str(max(0, total - 1)))
        layers += [f"{base}[{i:0{width}d}]" for i in range(total)]
    return tuple(layers), start
