"""The one agreement, made when the clipper is built: holders → shares, the same groups and
configuration on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from torch import Tensor

from distclip.errors import AgreementError, ConfigError, DistclipError
from distclip.exchange.channel import (
    Channel,
    first_rank,
    format_ranks,
    hash64,
    lines_by_rank,
    raise_on_all_ranks,
)
from distclip.records import OwnershipRow, ParamHolding, ParamPiece, PieceShare
from distclip.setup.inventory import DECLARE, exchange_tables
from distclip.setup.replicas import find_replicas, rows_of
from distclip.setup.rows import RowRange, cut_layers


@dataclass(frozen=True, slots=True)
class Plan:
    """What this rank measures and what it counts. Printing it gives the ownership table and never
    communicates."""

    pieces: tuple[ParamPiece, ...]
    shares: tuple[PieceShare, ...]
    groups: tuple[str, ...]  # sorted, equal on every rank
    group_of: tuple[int, ...]  # [pieces]
    layers: tuple[str, ...]  # watched ones: sorted, equal on every rank
    # [pieces], or nothing where none is watched; of a piece that is cut its first row's
    layer_of: tuple[int, ...]
    rows: tuple[OwnershipRow, ...]  # of all ranks
    ranks: tuple[int, ...]
    norm_type: float
    words: int  # float64 numbers in the one message of a step
    slot_of: tuple[int, ...]  # [pieces]: where the audit sums each parameter
    slots: int  # parameters over all ranks
    # [pieces]: how many rows a piece holds, each of the layer after the one before; None where it
    # is not cut, and nothing where none is on this rank
    layer_rows: tuple[int | None, ...] = ()
    apart: int = 0  # names that DTensors or wrapped parameters have on ranks that nothing joins

    def __str__(self) -> str:
        head = ("parameters", "elements", "held as", "over ranks", "copies")
        lines = [
            (
                f"{r.parameters:,}",
                f"{r.elements:,}",
                r.description,
                format_ranks(r.ranks),
                str(r.copies),
            )
            for r in self.rows
        ]
        width = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
        right = (0, 1, 4)

        def format_line(line: tuple[str, ...]) -> str:
            return "  ".join(
                c.rjust(w) if i in right else c.ljust(w)
                for i, (c, w) in enumerate(zip(line, width, strict=True))
            ).rstrip()

        names = [piece.name for piece in self.pieces]
        shown = ", ".join(names[:4] + (["…"] if len(names) > 5 else []) + names[4:][-1:])
        total, elements = sum(r.parameters for r in self.rows), sum(r.elements for r in self.rows)
        message = (
            f"one all_reduce of {self.words} float64 numbers ({8 * self.words} bytes) a step"
            if len(self.ranks) > 1
            else "no message: one process"
        )
        return "\n".join(
            [
                f"distclip plan: {total:,} parameters, {elements:,} elements, "
                f"{_count_text(len(self.groups), 'group')}, "
                f"{self.norm_type:g}-norm over {_count_text(len(self.ranks), 'rank')}",
                *map(format_line, (head, *lines)),
                *([self.apart_text()] if self.apart else []),
                f"this rank holds {_count_text(len(names), 'piece')}: {shown}",
                message,
            ]
        )

    def apart_text(self) -> str:
        return (
            f"{_count_text(self.apart, 'name')} on ranks that no parameter's mesh joins: taken for "
            f"different parameters there (pipeline "
            "stages); if they are copies, pass the whole model, or declare replicated_over"
        )


def _count_text(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def agree_on_call(
    channel: Channel, config: Mapping[str, str], error: Exception | None, device: torch.device
) -> None:
    """A collective of two words a rank: does every rank build the same clipper, without an error?

    Raises:
        Exception: `error`, on the rank that had it.
        AgreementError: on all ranks, if one of them had an error or another configuration.
    """
    if channel.size > 1:
        digest = hash64(str(sorted(config.items()))) if error is None else 0
        heads = channel.gather_ints(
            torch.tensor([digest, int(error is not None)], device="cpu"),
            device,
            "the set-up's first message",
        )
        if heads[:, 1].any():
            text = [f"{type(error).__name__}: {error}"] if error else []
            said = channel.gather_lines(text, device, "the report of a set-up error")
            if error is None:
                lines = "\n".join(lines_by_rank(said))
                error = AgreementError(f"another rank could not build its GradClipper:\n{lines}")
                channel.tell_once(error, first_rank(said))
            elif isinstance(error, DistclipError):
                channel.tell_once(error, min(said.get(text[0], [channel.global_rank])))
        elif (heads[:, 0] != heads[0, 0]).any():
            _name_difference(channel, config, device)
    if error is not None:
        raise error


def _name_difference(channel: Channel, config: Mapping[str, str], device: torch.device) -> None:
    texts = [f"{name}={value!r}" for name, value in sorted(config.items())]
    options: dict[str, dict[str, list[int]]] = {}
    said = channel.gather_lines(texts, device, "the comparison of configurations")
    for line, ranks in said.items():
        name, _, value = line.partition("=")
        options.setdefault(name, {})[value] = ranks
    lines = [
        f"{name}: "
        + "; ".join(f"{value} on rank {format_ranks(ranks)}" for value, ranks in values.items())
        for name, values in options.items()
        if len(values) > 1 or sum(map(len, values.values())) < channel.size
    ]
    text = "ranks built different GradClippers; pass the same options on all of them:"
    raise channel.tell_once(AgreementError("\n".join([text, *lines])))


def make_plan(
    channel: Channel,
    pieces: Sequence[ParamPiece],
    group_of: Sequence[str],
    patterns: Mapping[str, int],
    norm_type: float,
    device: torch.device,
    layer_of: Sequence[str] | None = None,
    beside: Sequence[ParamHolding] = (),
    needs: Mapping[str, int] | None = None,
    cuts: Sequence[RowRange | None] = (),
) -> Plan:
    """A collective on all ranks: three small all-reduces, and more only for an error's text.

    Args:
        group_of: [pieces] the group's name of each.
        layer_of: [pieces] the watched layer's name of each; None on all ranks where none is
            watched.
        beside: holdings of parameters without a piece; their meshes join ranks too.
        patterns: pattern or name that must match on some rank → how often it does on this one.
        needs: text of the error that is raised where there is none on any rank → how many there
            are on this one.
        cuts: [pieces] the indices of its first dimension that a piece holds, where each has a
            watched layer of its own; nothing where none is cut on this rank.

    Raises:
        AgreementError: shapes differ between holders, or parts do not add up to the whole.
        ConfigError: a pattern matches nothing on any rank, or no rank has a parameter; layers
            that are cut by rows differ in their number.
    """
    needs = needs or {}
    watched = [""] * len(pieces) if layer_of is None else layer_of
    tables = exchange_tables(
        channel, pieces, group_of, watched, [*patterns.values(), *needs.values()], device, beside
    )
    for pattern, count in zip(patterns, tables.counts):
        if not count:
            text = f"{pattern!r} matches no parameter on any rank"
            error = ConfigError(f"{text}; {_nearest_names(pattern, pieces)}")
            raise channel.tell_once(error)
    for text, count in zip(needs, tables.counts[len(patterns) :], strict=True):
        if not count:
            raise channel.tell_once(ConfigError(text))
    if not sum(map(len, tables.rows)):
        text = "params holds no parameters on any rank; pass the model, or (name, parameter) pairs"
        raise channel.tell_once(ConfigError(text))
    holders = find_replicas(tables, channel.rank, pieces)
    if holders.shape_conflicts:
        local = [
            f"{p.name} has shape {p.shape}"
            for p in pieces
            if hash64(p.key_name) in holders.shape_conflicts
        ]
        remedy = f"{DECLARE}. If they should be equal, build the same model on all ranks"
        raise_on_all_ranks(channel, local, device, "the comparison of shapes", remedy)

    held, whole = [0.0] * holders.slots, [0.0] * holders.slots
    for piece, share, slot, members in zip(
        pieces, holders.shares, holders.slot, holders.members, strict=True
    ):
        held[slot] += piece.local_numel / share.num_replicas
        whole[slot] += piece.numel / members
    sums = torch.tensor([held, whole], dtype=torch.float64, device="cpu")
    sums = channel.all_reduce_(
        sums.to(channel.comm_device(device)), "sum", "the set-up's count of elements"
    ).cpu()
    lost = (sums[0] - sums[1]).abs() > 1e-6 * sums[1] + 1e-3
    if lost.any():
        local = [
            f"{p.name} ({p.holding.description}): the parts held add up to {sums[0, s]:.0f} "
            f"elements of "
            f"{sums[1, s]:.0f}; every rank that "
            "holds a part must be in process_group, and copies must be declared by replicated_over"
            for p, s in zip(pieces, holders.slot, strict=True)
            if lost[s]
        ]
        raise_on_all_ranks(channel, local, device, "the comparison of elements")
    groups = _agreed_names(channel, [rows[:, 3] for rows in tables.rows], group_of, device)
    named_layers = (
        ()
        if layer_of is None
        else _agreed_names(channel, [rows[:, 4] for rows in tables.rows], watched, device)
    )
    group_at = {name: i for i, name in enumerate(groups)}
    layers, layer_at = cut_layers(named_layers, holders.parameters_under)
    first_layers = [layer_at[name] for name in watched] if layer_of is not None else []
    for i, cut in enumerate(cuts):
        if cut is not None:
            first_layers[i] += holders.number[i] * cut.whole + cut.first
    return Plan(
        pieces=tuple(pieces),
        shares=tuple(holders.shares),
        groups=groups,
        group_of=tuple(group_at[name] for name in group_of),
        layers=layers,
        layer_of=tuple(first_layers),
        layer_rows=tuple(None if cut is None else cut.held for cut in cuts),
        rows=rows_of(holders, sums[1], channel),
        ranks=channel.ranks,
        norm_type=norm_type,
        words=len(groups),
        slot_of=tuple(holders.slot),
        slots=holders.slots,
        apart=holders.apart,
    )


def _nearest_names(pattern: str, pieces: Sequence[ParamPiece]) -> str:
    """The names on this rank that are most similar to a pattern without a match."""
    names = {name for piece in pieces for name in (piece.name, piece.key_name)}
    if not names:
        return "this rank holds no parameters"
    letters = SequenceMatcher(b=pattern.translate(dict.fromkeys(map(ord, "*?[]!"))), autojunk=False)

    def name_similarity(name: str) -> float:
        ratios: list[float] = []
        for part in (name, *name.split(".")):
            letters.set_seq1(part)
            ratios.append(letters.ratio())
        return max(ratios)

    nearest = sorted(names, key=lambda name: (-name_similarity(name), name))[:3]
    return f"the nearest names on this rank: {', '.join(nearest)} ({len(names)} in all)"


def _agreed_names(
    channel: Channel, keys: Sequence[Tensor], own: Sequence[str], device: torch.device
) -> tuple[str, ...]:
    """All ranks' names, sorted. Only names that some rank lacks are sent.

    Args:
        keys: [tables] of [parameters] int64: the names' keys.
        own: [pieces] this rank's names.
    """
    known = [set(column.tolist()) for column in keys]
    everywhere = set.intersection(*known)
    here = {hash64(name): name for name in own}
    names = set(here.values())
    if set.union(*known) != everywhere:
        some = sorted(name for k, name in here.items() if k not in everywhere)
        for text in channel.gather_texts("\n".join(some), device, "the exchange of names"):
            names |= set(text.splitlines())
    return tuple(sorted(names))
