"""Which ranks hold copies or parts of the same parameters, computed from the tables that all ranks
have: the same on every rank, and nothing is sent."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from distclip.exchange.channel import Channel, hash64
from distclip.records import OwnershipRow, ParamPiece, PieceShare
from distclip.setup.inventory import HoldingTables, RemoteHolding


class ReplicaSet(NamedTuple):
    """Ranks that hold one parameter together: copies and sibling parts."""

    ranks: tuple[int, ...]  # positions
    description: str
    copies: int  # h of its first part


class ReplicaPosition(NamedTuple):
    """One holder's place among those that hold the same part."""

    component: int
    holders: int
    position: int  # among them
    members: int  # entries of the whole component


@dataclass(frozen=True, slots=True)
class ReplicaMap:
    """The holders of every parameter: computed on each rank, equal on all."""

    shares: list[PieceShare]  # [this rank's pieces]
    slot: list[int]  # [this rank's pieces]: position in the vector that checks the tiling
    members: list[int]  # [this rank's pieces]
    slots: int
    components: list[tuple[ReplicaSet, Tensor]]  # with the slots of its parameters, [n] int64
    shape_conflicts: set[int]  # keys of names that have several shapes
    apart: int  # names that DTensors or wrapped parameters have on ranks that nothing joins
    number: list[int]  # [this rank's pieces]: which of the different parameters under its name
    # [rows of all tables, 2] int64: key of the watched layer, different parameters under the name
    layer_numbers: Tensor

    def parameters_under(self, layer: str) -> set[int]:
        """How many different parameters bear one name, over the names of a watched layer."""
        mine = self.layer_numbers[:, 0] == hash64(layer)
        return set(self.layer_numbers[mine, 1].tolist())


def find_replicas(tables: HoldingTables, rank: int, pieces: Sequence[ParamPiece]) -> ReplicaMap:
    """Joins ranks whose rank sets overlap, transitively, for each parameter; then counts equal
    regions. Sends nothing.

    Ranks are also joined where they work on one set of modules (`_module_sets`): FSDP2 over dp
    beside tensor parallelism holds what no tensor-parallel plan names on the dp meshes alone, and
    the ranks of one tp mesh hold copies of it.

    Parameters that the same holdings of the same tables hold are one case, so ranks are joined once
    for each case, not for each name.
    """
    owner = torch.cat(
        [torch.full((len(rows),), i, device="cpu") for i, rows in enumerate(tables.rows)]
    )
    rows = torch.cat(tables.rows)
    names, name_of = torch.unique(rows[:, 0], return_inverse=True)
    mark = _mix_bits(owner * 1_000_003 + rows[:, 1] + 1)
    signature = torch.zeros(len(names), dtype=torch.int64, device="cpu").index_add_(
        0, name_of, mark
    )
    cases, case_of = torch.unique(signature, return_inverse=True)
    places, components, apart = _solve_cases(
        tables, _module_sets(tables), owner, rows, name_of, case_of, len(cases)
    )

    per_name = torch.tensor([len(c) for c in components], device="cpu")[case_of]
    base = per_name.cumsum(0) - per_name
    # few of all names are this rank's, where every rank has its own: only those become Python
    # numbers
    keys = [hash64(piece.key_name) for piece in pieces]
    at = torch.searchsorted(names, torch.tensor(keys, dtype=torch.int64, device="cpu"))
    shares: list[PieceShare] = []
    slot: list[int] = []
    number: list[int] = []
    members: list[int] = []
    # a rank may hold a tied parameter under two names
    copy_of: dict[tuple[int, int], int] = defaultdict(int)
    ordinals = tables.rows[tables.mine][:, 1].tolist()
    for name_key, first, case, ordinal in zip(
        keys, base[at].tolist(), case_of[at].tolist(), ordinals, strict=True
    ):
        found = places[case][rank, ordinal]
        place = found[min(copy_of[name_key, ordinal], len(found) - 1)]
        copy_of[name_key, ordinal] += 1
        shares.append(PieceShare(place.holders, _drift_weight(name_key, place)))
        slot.append(first + place.component)
        number.append(place.component)
        members.append(place.members)
    of_case = case_of.argsort(stable=True).split(
        torch.bincount(case_of, minlength=len(cases)).tolist()
    )
    table = [
        (component, base[at] + i)
        for at, found in zip(of_case, components, strict=True)
        for i, component in enumerate(found)
    ]
    return ReplicaMap(
        shares=shares,
        slot=slot,
        members=members,
        slots=int(per_name.sum()),
        components=table,
        shape_conflicts=_find_shape_conflicts(tables, rows, names, name_of, case_of, places, owner),
        apart=int(torch.tensor(apart, device="cpu")[case_of].sum()),
        number=number,
        layer_numbers=torch.stack([rows[:, 4], per_name[name_of]], dim=1),
    )


def _mix_bits(x: Tensor) -> Tensor:
    """Spreads small integers over 64 bits (splitmix64's steps, on wrapping int64)."""
    x = x * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)


_Positions = dict[tuple[int, int], list[ReplicaPosition]]


def _module_sets(tables: HoldingTables) -> list[Hashable]:
    """[ranks] equal for ranks that work on one set of modules: some parameter's mesh, or the group
    of a wrapper, has both, transitively.

    What is declared or tied joins no ranks beyond its own parameters: an embedding is tied over
    stages that are different modules.
    """
    joined = _UnionFind()
    for rank, holdings in enumerate(tables.holdings):
        for holding in holdings:
            for rank_set in holding.module_rank_sets:
                joined.merge_sets(("rank", rank), rank_set)
    return [joined.find_root(("rank", rank)) for rank in range(len(tables.holdings))]


class _UnionFind:
    """A union-find: `find_root` is equal for items that were merged."""

    def __init__(self) -> None:
        self._parent: dict[Hashable, Hashable] = {}

    def find_root(self, item: Hashable) -> Hashable:
        while (parent := self._parent.setdefault(item, item)) != item:
            self._parent[item] = self._parent[parent]
            item = parent
        return item

    def merge_sets(self, one: Hashable, other: Hashable) -> None:
        self._parent[self.find_root(other)] = self.find_root(one)


def _solve_cases(
    tables: HoldingTables,
    module_sets: Sequence[Hashable],
    owner: Tensor,
    rows: Tensor,
    name_of: Tensor,
    case_of: Tensor,
    count: int,
) -> tuple[list[_Positions], list[list[ReplicaSet]], list[bool]]:
    """For each case the place of every (rank, holding) and the components, from one example
    name."""
    example = torch.full((count,), -1, device="cpu").scatter_(
        0, case_of, torch.arange(len(case_of), device="cpu")
    )
    is_example = torch.zeros(len(case_of), dtype=torch.bool, device="cpu")
    is_example[example] = True
    entries: dict[int, list[tuple[int, int]]] = defaultdict(list)
    chosen = is_example[name_of]
    for table, ordinal, case in zip(
        owner[chosen].tolist(),
        rows[chosen, 1].tolist(),
        case_of[name_of[chosen]].tolist(),
        strict=True,
    ):
        entries[case] += [(rank, ordinal) for rank in tables.ranks_of[table]]
    solved = [_solve_case(tables, module_sets, sorted(entries[case])) for case in range(count)]
    return (
        [places for places, _, _ in solved],
        [components for _, components, _ in solved],
        [apart for _, _, apart in solved],
    )


def _solve_case(
    tables: HoldingTables, module_sets: Sequence[Hashable], entries: list[tuple[int, int]]
) -> tuple[_Positions, list[ReplicaSet], bool]:
    joined = _UnionFind()
    for rank, ordinal in entries:
        holding = tables.holdings[rank][ordinal]
        first, *others = cast("tuple[Hashable, ...]", holding.rank_sets)
        if _joins_modules(holding):
            others.append(("modules", module_sets[rank]))
        for rank_set in others:
            joined.merge_sets(first, rank_set)
    together: dict[Hashable, list[tuple[int, int]]] = defaultdict(list)
    for rank, ordinal in entries:
        together[joined.find_root(tables.holdings[rank][ordinal].rank_sets[0])].append(
            (rank, ordinal)
        )

    places: _Positions = defaultdict(list)
    components: list[ReplicaSet] = []
    for number, members in enumerate(together.values()):
        holders: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for rank, ordinal in members:
            holders[tables.holdings[rank][ordinal].region].append((rank, ordinal))
        for same in holders.values():
            for i, (rank, ordinal) in enumerate(same):
                places[rank, ordinal].append(ReplicaPosition(number, len(same), i, len(members)))
        descriptions = dict.fromkeys(
            tables.holdings[rank][ordinal].description for rank, ordinal in members
        )
        ranks = tuple(sorted({rank for rank, _ in members}))
        components.append(
            ReplicaSet(ranks, " / ".join(descriptions), len(next(iter(holders.values()))))
        )
    read = [
        any(_joins_modules(tables.holdings[rank][ordinal]) for rank, ordinal in members)
        for members in together.values()
    ]
    return places, components, sum(read) > 1


def _joins_modules(holding: RemoteHolding) -> bool:
    """Whether ranks that work on the same modules hold copies of it. Not where the caller declared
    the copies."""
    return bool(holding.module_rank_sets) and not holding.declared


def _find_shape_conflicts(
    tables: HoldingTables,
    rows: Tensor,
    names: Tensor,
    name_of: Tensor,
    case_of: Tensor,
    places: list[_Positions],
    owner: Tensor,
) -> set[int]:
    """Keys of names whose copies or parts disagree about the whole parameter's shape."""
    shape = torch.zeros(len(names), dtype=torch.int64, device="cpu").scatter_(
        0, name_of, rows[:, 2]
    )
    suspects = name_of[rows[:, 2] != shape[name_of]].unique().tolist()
    out: set[int] = set()
    for at in suspects:
        shapes: dict[int, set[int]] = defaultdict(set)
        for i in (name_of == at).nonzero().flatten().tolist():
            ordinal = int(rows[i, 1])
            for rank in tables.ranks_of[int(owner[i])]:
                for place in places[int(case_of[at])][rank, ordinal]:
                    shapes[place.component].add(int(rows[i, 2]))
        if any(len(found) > 1 for found in shapes.values()):
            out.add(int(names[at]))
    return out


def _drift_weight(name_key: int, place: ReplicaPosition) -> float:
    """This holder's weight in the drift sum: between 1/8 and 1 in size, zero-sum over the holders,
    0 for a single one."""
    if place.holders == 1:
        return 0.0
    draw = random.Random(name_key)
    size = draw.uniform(0.5, 1.0) * draw.choice((-1.0, 1.0))
    return size * drift_pattern(place.holders)[place.position]


_PATTERNS: dict[int, tuple[float, ...]] = {}


def drift_pattern(holders: int) -> tuple[float, ...]:
    """Zero-sum numbers, each between 1/4 and 1 in size, of which no small subset sums to zero (as
    pairs of +1 and -1 would)."""
    if holders not in _PATTERNS:
        draw = random.Random(holders)
        while True:
            raw = [draw.uniform(0.5, 1.0) * (1 if i % 2 else -1) for i in range(holders)]
            mean = sum(raw) / holders
            centred = [x - mean for x in raw]
            largest = max(map(abs, centred))
            scaled = tuple(x / largest for x in centred)
            if min(map(abs, scaled)) >= 0.25:
                _PATTERNS[holders] = scaled
                break
    return _PATTERNS[holders]


def rows_of(holders: ReplicaMap, elements: Tensor, channel: Channel) -> tuple[OwnershipRow, ...]:
    """The lines of the ownership table. `elements`: [slots] float64, each parameter's global number
    of elements."""
    merged: dict[tuple[str, tuple[int, ...], int], list[int]] = defaultdict(lambda: [0, 0])
    for component, slots in holders.components:
        ranks = tuple(channel.ranks[position] for position in component.ranks)
        line = merged[component.description, ranks, component.copies]
        line[0] += len(slots)
        line[1] += round(float(elements[slots].sum()))
    return tuple(
        OwnershipRow(
            parameters=count, elements=total, description=description, ranks=ranks, copies=copies
        )
        for (description, ranks, copies), (count, total) in merged.items()
    )
