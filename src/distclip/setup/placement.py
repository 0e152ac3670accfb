"""Parameter → piece. What does this rank hold, and together with whom? Reads specs and handles;
sends nothing.

Instances of the one idea (name, region, replica set):
  plain tensor          the whole parameter, copied over all ranks that have the name
  inside DDP            the whole parameter, copied over DDP's process group
  DTensor               the part at this rank's mesh coordinate, copied along the Replicate
  dimensions of its mesh
  FSDP1                 the flat shard's part, copied over the replicating group of HYBRID_SHARD
  declared              as above, and over the group that `replicated_over` names; `PRIVATE`: a
  parameter of this rank alone
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, cast

import torch
from torch.distributed import ProcessGroup, get_process_group_ranks

from distclip.errors import ConfigError, PlacementError
from distclip.records import ParamHolding, ParamPiece
from distclip.setup.parameters import NamedParam
from distclip.torch_internals.dtensor import dtensor_local, is_dtensor, spec_of
from distclip.torch_internals.fsdp1 import FlatShard, is_flattened

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement


class _PrivateType:
    def __repr__(self) -> str:
        return "distclip.PRIVATE"


PRIVATE: Final = _PrivateType()
ReplicatedOver: TypeAlias = Mapping[str, "ProcessGroup | _PrivateType"]
Shared: TypeAlias = Sequence[Sequence[str]]

DEVICES = ("cpu", "cuda")
_DECLARED = (
    "pass a pattern of names, and for it a process group that this rank is in, or distclip.PRIVATE"
)
EVERYWHERE = "all ranks with the name"


@dataclass(frozen=True, slots=True)
class ReplicaDeclarations:
    """What the caller declared beyond what can be read from the parameters."""

    replicated_over: ReplicatedOver
    shared: Shared

    def all_patterns(self) -> list[str]:
        """Patterns and names of which each must match on some rank."""
        return [*self.replicated_over, *(name for names in self.shared for name in names)]


def declare_replicas(replicated_over: Any, shared: Any) -> ReplicaDeclarations:
    """What was passed under these names.

    Raises:
        ConfigError: it is of another kind.
    """
    table = {} if replicated_over is None else replicated_over
    if not isinstance(table, Mapping):
        raise ConfigError(
            f"replicated_over is a {type(table).__name__}; pass "
            "{pattern: process group | distclip.PRIVATE}"
        )
    for pattern, group in cast("Mapping[Any, Any]", table).items():
        # on ranks outside a group torch has a number in its place
        known = group is None or isinstance(group, (ProcessGroup, _PrivateType, int))
        if not isinstance(pattern, str) or not known:
            raise ConfigError(f"replicated_over={{{pattern!r}: {group!r}}}: {_DECLARED}")
    if not _are_tuples_of_names(shared):
        raise ConfigError(
            f"shared={shared!r}; pass tuples of names that are one parameter: "
            'shared=[("embed.weight", "head.weight")]'
        )
    return ReplicaDeclarations(dict(table), tuple(tuple(names) for names in shared))


def _are_tuples_of_names(shared: Any) -> bool:
    return isinstance(shared, Sequence) and all(
        isinstance(names, Sequence)
        and not isinstance(names, str)
        and all(isinstance(name, str) for name in cast("Sequence[Any]", names))
        for names in cast("Sequence[Any]", shared)
    )


def local_pieces(
    named: Sequence[NamedParam], declared: ReplicaDeclarations, rank: int
) -> list[tuple[NamedParam, ParamPiece]]:
    """The pieces that this rank holds, with their parameters; those on a mesh without this rank
    have none.

    Frozen parameters are pieces too: their meshes say which ranks work together, and they may be
    unfrozen. Their device is not checked.

    Raises:
        PlacementError: a trainable parameter on a device that is not supported, or that is a
            DTensor of unreduced sums; an FSDP1 parameter outside its root.
        ConfigError: a declared group does not contain this rank.
    """
    for n in named:
        if n.param.requires_grad and n.param.device.type not in DEVICES:
            raise PlacementError(
                f"{n.name} is on the device {n.param.device}; distclip clips on the CPU and on "
                f"CUDA. A model on `meta` has no values yet: "
                "build the clipper after it was materialised"
            )
    try:
        out = [(n, _piece_of(n, declared, rank)) for n in named]
    finally:  # what is remembered would keep groups and meshes alive after the next rebuild
        ranks_token.cache_clear()
        _mesh_facts.cache_clear()
    return [(n, piece) for n, piece in out if piece is not None]


def _piece_of(named: NamedParam, declared: ReplicaDeclarations, rank: int) -> ParamPiece | None:
    over = _declared_rank_set(named.name, declared.replicated_over, rank)
    around = tuple(ranks_token(group) for group in named.ddp_groups)
    key, tied = named.name, ()
    for names in declared.shared:
        if named.name in names:
            key, tied = names[0], ("shared " + " = ".join(names),)
    if over == (private_token(rank),):
        around = ()
        # what is tied over ranks is not private, whatever pattern matches it
        over = () if tied else over
    rank_sets = _RankSets(around, over, tied)
    if named.shard is not None:
        return _flat_piece(named, key, named.shard, rank_sets)
    if is_flattened(named.param):
        raise PlacementError(
            f"{named.name} is a shard of an FSDP1 unit whose handle is out of sight; pass the "
            f"outermost "
            "FullyShardedDataParallel module itself: GradClipper(model, ...), neither model.module "
            "nor its parameters"
        )
    spec = spec_of(named.param)
    if spec is not None:
        return _dtensor_piece(named, key, spec, rank_sets)
    param = named.param
    description = "whole, in DDP" if around else "whole"
    if over:
        description = "private" if over == (private_token(rank),) else "whole, declared"
    holding = rank_sets.make_holding(description, "whole", ())
    shape = tuple(param.shape)
    return ParamPiece(
        name=named.name,
        key_name=key,
        holding=holding,
        shape=shape,
        numel=param.numel(),
        local_shape=shape,
        placements=None,
    )


class _RankSets(NamedTuple):
    """Sets of ranks around a parameter, besides those of the parameter itself."""

    ddp_groups: tuple[str, ...]  # groups of DDP modules
    declared: tuple[str, ...]  # by `replicated_over`
    tied: tuple[str, ...]  # by `shared`

    def make_holding(self, description: str, region: str, own: tuple[str, ...]) -> ParamHolding:
        """`own`: the parameter's mesh, or its unit's groups."""
        every = (*own, *self.ddp_groups, *self.declared, *self.tied)
        return ParamHolding(
            description=description,
            region=region,
            rank_sets=every or (EVERYWHERE,),
            module_rank_sets=(*own, *self.ddp_groups),
            declared=bool(self.declared),
        )


def _flat_piece(named: NamedParam, key: str, shard: FlatShard, rank_sets: _RankSets) -> ParamPiece:
    index, parts = shard.part
    description = f"FSDP1 shard, {parts} parts" if parts > 1 else "whole, in FSDP1"
    region, over = f"flat {index}/{parts}", tuple(map(ranks_token, shard.groups))
    if shard.spec is not None:  # of this rank's part under tensor parallelism
        placed = _dtensor_part(shard.spec)
        description, region, over = (
            f"{description}, of {placed.description}",
            f"{placed.region} {region}",
            (placed.mesh, *over),
        )
    holding = rank_sets.make_holding(description, region, over)
    return ParamPiece(
        name=named.name,
        key_name=key,
        holding=holding,
        shape=shard.shape,
        numel=shard.numel,
        local_shape=shard.local_shape,
        placements=None,
    )


_IS_PARTIAL = methodcaller("is_partial")


class _DTensorPart(NamedTuple):
    """Which part of a DTensor this rank holds."""

    description: str
    region: str
    mesh: str  # token of its ranks


def _dtensor_part(spec: Any) -> _DTensorPart:
    """The mesh must have this rank. A frozen parameter may be Partial: its unreduced sums count as
    copies."""
    mesh, placements = spec.mesh, tuple(spec.placements)
    sizes, token = _mesh_facts(mesh)
    # Shard, _StridedShard, and whatever else splits: all that is not a copy gives this rank a part
    # of its own
    split = [
        f"{p}:{c}/{n}"
        for p, c, n in zip(placements, mesh.get_coordinate(), sizes, strict=True)
        if not is_copy(p)
    ]
    return _DTensorPart(_describe_placements(placements, sizes), " ".join(split) or "whole", token)


def is_copy(placement: Placement) -> bool:
    return placement.is_replicate() or placement.is_partial()


def _dtensor_piece(
    named: NamedParam, key: str, spec: Any, rank_sets: _RankSets
) -> ParamPiece | None:
    placements: tuple[Placement, ...] = tuple(spec.placements)
    if spec.mesh.get_coordinate() is None:
        return None
    if named.param.requires_grad and any(map(_IS_PARTIAL, placements)):
        raise PlacementError(
            f"{named.name}: placements {placements} hold unreduced partial sums; redistribute the "
            f"parameter to Shard or Replicate"
        )
    placed = _dtensor_part(spec)
    param, shape = named.param, tuple(spec.shape)
    made_local = not is_dtensor(param)  # by DDP
    local = param if made_local else dtensor_local(param)
    holding = rank_sets.make_holding(placed.description, placed.region, (placed.mesh,))
    numel = torch.Size(shape).numel()
    return ParamPiece(
        name=named.name,
        key_name=key,
        holding=holding,
        shape=shape,
        numel=numel,
        local_shape=tuple(local.shape),
        placements=None if made_local else placements,
    )


@lru_cache(maxsize=256)
def _describe_placements(placements: tuple[Placement, ...], sizes: tuple[int, ...]) -> str:
    return f"{', '.join(map(_placement_name, placements))} on a {' x '.join(map(str, sizes))} mesh"


def _placement_name(placement: Placement) -> str:
    return (
        "Replicate"
        if placement.is_replicate()
        else str(placement).replace("S(", "Shard(").lstrip("_")
    )


def _declared_rank_set(name: str, declared: ReplicatedOver, rank: int) -> tuple[str, ...]:
    for pattern, group in declared.items():
        if fnmatchcase(name, pattern):
            if isinstance(group, _PrivateType):
                return (private_token(rank),)
            if not isinstance(group, ProcessGroup):
                raise ConfigError(f"replicated_over[{pattern!r}] is {group!r}: {_DECLARED}")
            ranks = get_process_group_ranks(group)
            if rank not in ranks:
                raise ConfigError(
                    f"replicated_over[{pattern!r}] is the group of ranks {ranks}, and this is rank "
                    f"{rank}; "
                    "on each rank pass the group that this rank's copies of the parameter are in"
                )
            return (ranks_token(group),)
    return ()


@lru_cache(maxsize=64)
def _mesh_facts(mesh: Any) -> tuple[tuple[int, ...], str]:
    """A mesh's sizes and the token of its ranks, which torch would recompute for each parameter."""
    return tuple(mesh.shape), "ranks " + ",".join(map(str, sorted(mesh.mesh.flatten().tolist())))


@lru_cache(maxsize=256)
def ranks_token(group: ProcessGroup) -> str:
    return "ranks " + ",".join(map(str, sorted(get_process_group_ranks(group))))


def private_token(rank: int) -> str:
    return f"private to {rank}"
