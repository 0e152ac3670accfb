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
from distclip.policies.assignment import policy_of
from distclip.policies.policy import UnitPolicy
from distclip.records import Holding, Piece
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
    join: JoinGuard = field(default_factory=lambda: JoinGuard(()))
    wrappers: tuple[ReducingWrapper, ...] = ()  # modules that may leave gradients unfinished


@dataclass(slots=True)
class _LocalSetup:
    """What this rank reads by itself, before any exchange."""

    options: ClipOptions | None = None
    declared: ReplicaDeclarations = field(default_factory=lambda: ReplicaDeclarations({}, ()))
    config: dict[str, str] = field(default_factory=lambda: {})
    scan: ParamScan = field(default_factory=ParamScan)
    wrappers: tuple[ReducingWrapper, ...] = ()
    members: list[Tensor] = field(default_factory=lambda: [])
    pieces: list[Piece] = field(default_factory=lambda: [])
    groups: list[str] = field(default_factory=lambda: [])
    layers: list[str] = field(default_factory=lambda: [])
    ranges: list[UnitRange | None] = field(default_factory=lambda: [])
    beside: list[Holding] = field(default_factory=lambda: [])  # of parameters without a piece


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
    join = JoinGuard(modules_in(params), tensors_in(params)) if channel.size > 1 else JoinGuard(())
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
    layers = None if watch is None else local.layers
    plan = make_plan(
        channel, local.pieces, local.groups, counts, options.norm_type, device, layers, local.beside
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
    )


def _read_locally(
    local: _LocalSetup,
    params: Params,
    passed: PassedOptions,
    channel: Channel,
) -> None:
    local.options = options = check_options(passed)
    local.declared = declared = declare_replicas(passed.replicated_over, passed.shared)
    local.scan = scan = named_parameters(params)
    local.wrappers = reducing_wrappers(params)
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
    if options.watch is not None:
        local.layers = options.watch.groups.assign(names, local.members)
    rules = options.grouping.rules()
    local.ranges = [
        unit_range(param, piece)
        if isinstance(policy_of(rules.get(group), options.policy), UnitPolicy)
        else None
        for group, param, piece in zip(local.groups, local.members, local.pieces, strict=True)
    ]
    told = {"replicated_over": ", ".join(declared.replicated_over), "shared": repr(declared.shared)}
    local.config = options.config_texts() | told


def _num_matches(pattern: str, held: Sequence[Piece]) -> int:
    return sum(
        fnmatchcase(name, pattern)
        for name in {name for piece in held for name in (piece.name, piece.key_name)}
    )
