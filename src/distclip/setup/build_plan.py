"""What the caller passed → an agreed plan. An error on one rank is raised on all ranks before
anything is kept."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from distclip.errors import ConfigError
from distclip.exchange.channel import Channel
from distclip.groups import Grouping
from distclip.policies.assignment import policy_of
from distclip.policies.policy import UnitPolicy
from distclip.records import ParamHolding, ParamPiece
from distclip.setup.options import ClipOptions, PassedOptions, check_options, check_sinks
from distclip.setup.parameters import (
    Params,
    ParamScan,
    modules_in,
    named_parameters,
    tensors_in,
)
from distclip.setup.placement import ReplicaDeclarations, declare_replicas, local_pieces
from distclip.setup.plan import Plan, agree_on_call, make_plan
from distclip.setup.rows import RowRange, cut_name, row_range
from distclip.setup.steps_in_backward import stepped_in_backward
from distclip.setup.unfinished_backward import ReducingWrapper, reducing_wrappers
from distclip.setup.units import UnitRange, unit_range
from distclip.torch_internals.join import JoinGuard


@dataclass(frozen=True, slots=True)
class SetupInputs:
    """The parameters as they are now."""

    options: ClipOptions
    config: str  # the options as a text, equal on all ranks
    members: list[Tensor]  # [pieces] the parameters
    scan: ParamScan
    ranges: list[UnitRange | None]  # [pieces]: their units, where their group is scaled by units
    plan: Plan
    device: torch.device  # the compute device
    join: JoinGuard | None = None  # None: nothing here can be inside `join()`
    wrappers: tuple[ReducingWrapper, ...] = ()  # modules that may leave gradients unfinished
    out_of_reach: str = ""  # about parameters that no clip can reach, on this rank


@dataclass(slots=True)
class _LocalSetup:
    """What this rank reads by itself, before any exchange."""

    options: ClipOptions | None = None
    declared: ReplicaDeclarations = field(default_factory=lambda: ReplicaDeclarations({}, ()))
    config: dict[str, str] = field(default_factory=lambda: {})
    scan: ParamScan = field(default_factory=ParamScan)
    wrappers: tuple[ReducingWrapper, ...] = ()
    members: list[Tensor] = field(default_factory=lambda: [])
    pieces: list[ParamPiece] = field(default_factory=lambda: [])
    groups: list[str] = field(default_factory=lambda: [])
    layers: list[str] = field(default_factory=lambda: [])
    # where watched layers cut pieces by rows
    cuts: list[RowRange | None] = field(default_factory=lambda: [])
    ranges: list[UnitRange | None] = field(default_factory=lambda: [])
    beside: list[ParamHolding] = field(default_factory=lambda: [])  # of parameters without a piece
    out_of_reach: str = ""  # about parameters that no clip can reach, on this rank


def build_plan(
    params: Params,
    passed: PassedOptions,
    channel: Channel,
    sinks: Any = (),
) -> SetupInputs:
    """A collective.

    Raises:
        ConfigError, PlacementError: on the rank where it was found; AgreementError on the others.
            ConfigError inside `join()`, before anything is sent.
    """
    join = JoinGuard.of_model(modules_in(params), tensors_in(params)) if channel.size > 1 else None
    if join is not None:
        join.refuse_join("GradClipper")
    local, error = _LocalSetup(), None
    try:
        if channel.rank == 0:
            check_sinks(sinks, channel.global_rank)
        _read_locally(local, params, passed, channel)
    except Exception as e:
        error = e
    device = next(
        (param.device for param in local.members if param.device.type == "cuda"),
        torch.device("cpu"),
    )
    agree_on_call(channel, local.config, error, device)
    assert local.options is not None, "without an error it is there"
    options, watch = local.options, local.options.watch
    patterns = [
        *local.declared.all_patterns(),
        *options.grouping.patterns(),
        *(watch.groups.patterns() if watch else ()),
    ]
    counts = {pattern: _num_matches(pattern, local.pieces) for pattern in patterns}
    needs = dict(options.grouping.needs(local.members))
    if watch is not None:
        needs |= watch.groups.needs(local.members)
    plan = make_plan(
        channel,
        local.pieces,
        local.groups,
        counts,
        options.norm_type,
        device,
        layer_of=None if watch is None else local.layers,
        beside=local.beside,
        needs=needs,
        cuts=local.cuts,
    )
    # a list of parameters may lack those whose meshes join the ranks
    if plan.apart and not local.scan.modules:
        logging.getLogger("distclip").warning(
            "GradClipper of parameters without their modules: %s", plan.apart_text()
        )
    config = str(sorted(local.config.items()))
    return SetupInputs(
        options=options,
        config=config,
        members=local.members,
        scan=local.scan,
        ranges=local.ranges,
        plan=plan,
        device=device,
        join=join,
        wrappers=local.wrappers,
        out_of_reach=local.out_of_reach,
    )


def _read_locally(
    local: _LocalSetup,
    params: Params,
    passed: PassedOptions,
    channel: Channel,
) -> None:
    local.options = options = check_options(passed)
    if options.by_rank and sorted(passed.rank_norms.ranks) != sorted(channel.ranks):
        raise ConfigError(
            f"rank_norms: gradients are reduced over ranks {passed.rank_norms.ranks}, and this "
            f"clipper is of ranks {channel.ranks}: ranks that hold different parts (tensor, "
            f"pipeline or expert parallelism) cannot be compared"
        )
    local.declared = declared = declare_replicas(passed.replicated_over, passed.shared)
    local.scan = scan = named_parameters(params)
    local.wrappers = reducing_wrappers(params)
    local.out_of_reach = stepped_in_backward(scan)
    if channel.size > 1 and any(
        n.positional and not hasattr(n.param, "placements") for n in scan.named
    ):
        raise ConfigError(
            "bare parameters have no names, and their positions may mean different parameters on "
            "other ranks; "
            "pass the model, or model.named_parameters()"
        )
    held = local_pieces(scan.named, declared, channel.global_rank)
    local.beside = [
        piece.holding
        for _, piece in local_pieces(scan.whole_numbers, declared, channel.global_rank)
        if piece.placements
    ]
    local.members, local.pieces = [named.param for named, _ in held], [piece for _, piece in held]
    names = [piece.key_name for piece in local.pieces]
    local.groups = options.grouping.assign(names, local.members)
    if any(options.grouping.cuts(names)):
        raise ConfigError(
            "groups=per_expert(...): all of a gradient tensor is multiplied by one coefficient, so "
            "its experts cannot be clipped apart; watch them, watch=distclip.Watch(distclip."
            "per_expert(...)), and clip them together, groups=distclip.by_name({'*.experts.*': "
            "1.0}), or each output by policy=distclip.AGC(...)"
        )
    if options.watch is not None:
        _read_layers(local, options.watch.groups, names)
    rules = options.grouping.rules()
    # asked once a group: it is slow
    unitwise = {
        group
        for group in set(local.groups)
        if isinstance(policy_of(rules.get(group), options.policy), UnitPolicy)
    }
    local.ranges = [
        unit_range(param, piece) if group in unitwise else None
        for group, param, piece in zip(local.groups, local.members, local.pieces, strict=True)
    ]
    told = {"replicated_over": ", ".join(declared.replicated_over), "shared": repr(declared.shared)}
    local.config = options.config_texts() | told


def _read_layers(local: _LocalSetup, watched: Grouping, names: Sequence[str]) -> None:
    local.layers = watched.assign(names, local.members)
    cuts = watched.cuts(names)
    if any(cuts):
        local.cuts = [
            row_range(param, piece) if cut else None
            for cut, param, piece in zip(cuts, local.members, local.pieces, strict=True)
        ]
        local.layers = [
            name if rows is None else cut_name(name, rows.whole)
            for name, rows in zip(local.layers, local.cuts, strict=True)
        ]


def _num_matches(pattern: str, held: Sequence[ParamPiece]) -> int:
    return sum(
        fnmatchcase(name, pattern)
        for name in {name for piece in held for name in (piece.name, piece.key_name)}
    )
