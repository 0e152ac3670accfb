"""FSDP1's private handles, read in this file alone: which part of each parameter the flat shards of
this rank hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from distclip.errors import PlacementError
from distclip.torch_internals.dtensor import imported_class


@dataclass(frozen=True, slots=True)
class FlatShard:
    """One parameter of an FSDP1 unit."""

    groups: tuple[ProcessGroup, ...]  # over which the unit is sharded and replicated
    part: tuple[int, int]  # (index, of how many); (0, 1) where the unit is not sharded
    shape: tuple[int, ...]  # of the whole parameter
    numel: int  # of the whole parameter
    local_shape: tuple[int, ...]  # of this rank's gradient
    # DTensorSpec of a parameter that tensor parallelism had placed before: the unit shards this
    # rank's part of it
    spec: Any = None


def is_flattened(param: Tensor) -> bool:
    """FSDP1 marks its parameters, whichever `use_orig_params`."""
    return bool(getattr(param, "_fsdp_flattened", False))


def first_flattened(params: Sequence[Tensor]) -> int | None:
    """The position of the first FSDP1 shard among them. None at once where FSDP was not imported:
    asking each tensor for an attribute that it lacks takes as long as reading a small one."""
    if imported_class("torch.distributed.fsdp", "FullyShardedDataParallel") is None:
        return None
    marks = (i for i, param in enumerate(params) if getattr(param, "_fsdp_flattened", False))
    return next(marks, None)


def flat_shards(module: nn.Module) -> dict[int, FlatShard]:
    """id(parameter) → its shard, for all FSDP1 units in `module`.

    Raises:
        PlacementError: this torch keeps its handles elsewhere.
    """
    shards: dict[int, FlatShard] = {}
    kind = imported_class("torch.distributed.fsdp", "FullyShardedDataParallel")
    if kind is None:
        return shards
    for unit in module.modules():
        if isinstance(unit, kind):
            try:
                shards |= _of_unit(unit)
            except AttributeError as error:
                raise PlacementError(
                    f"FSDP1: this torch keeps its flat parameters in another way ({error}); "
                    "use a torch that distclip names as supported, or FSDP2's fully_shard"
                ) from error
    return shards


def _of_unit(unit: Any) -> dict[int, FlatShard]:
    handle = unit._handle
    if handle is None:
        return {}
    flat, group = handle.flat_param, handle.process_group
    groups = (
        (group,) if getattr(unit, "_inter_node_pg", None) is None else (group, unit._inter_node_pg)
    )
    sharded = bool(handle.uses_sharded_strategy)
    part = (group.rank(), group.size()) if sharded else (0, 1)
    specs: tuple[Any, ...] = flat._param_extensions
    if not handle._use_orig_params:
        if any(spec is not None for spec in specs):
            raise PlacementError(
                f"FSDP1 has put {', '.join(flat._fqns)} into one flat parameter, and some of them "
                f"are DTensors of tensor parallelism: "
                "parts and copies in one tensor have no common norm; wrap with "
                "use_orig_params=True, or use fully_shard (FSDP2)"
            )
        # padding of the flat parameter carries zero gradients: it counts as elements, never in the
        # norm
        local = tuple(flat._sharded_size) if sharded else tuple(flat._unpadded_unsharded_size)
        numel = local[0] * part[1]
        return {
            id(flat): FlatShard(
                groups=groups, part=part, shape=(numel,), numel=numel, local_shape=local
            )
        }
    shards: dict[int, FlatShard] = {}
    for param, shape, info, spec in zip(
        flat._params, flat._shapes, flat._shard_param_infos, specs, strict=True
    ):
        local = (
            ((info.numel_in_shard or 0,) if info.in_shard else (0,)) if sharded else tuple(shape)
        )
        whole = shape if spec is None else spec.shape
        shards[id(param)] = FlatShard(
            groups=groups,
            part=part,
            shape=tuple(whole),
            numel=whole.numel(),
            local_shape=local,
            spec=spec,
        )
    return shards
