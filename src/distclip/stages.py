"""What every step uses, made once from the agreed plan."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from distclip.apply.gradients import GradientApplier
from distclip.decide.decision import decide, ever_skips
from distclip.decide.enforce import StepChecker
from distclip.decide.fixed_on_device import FixedOnDevice, fixed_on_device
from distclip.decide.global_norms import FEW, idle_norms
from distclip.decide.guard import SkipStreak
from distclip.decide.warn import StepWarnings
from distclip.errors import ConfigError
from distclip.exchange.channel import Channel
from distclip.exchange.message import MessageLayout
from distclip.kernels import kernels_for
from distclip.measure.collect import GradientCollector, GradOf
from distclip.measure.local_sums import LocalMeasurer
from distclip.measure.rank_norms import RankNorms
from distclip.measure.rows import RowSums
from distclip.measure.units import UnitClipper
from distclip.optimizers import OptimizerIndex
from distclip.p_norm import DOUBLE_BITS, SINGLE_BITS
from distclip.policies.assignment import PolicyAssignment, assign_policies, groups_in_total
from distclip.policies.policy import UnitPolicy
from distclip.policies.state import State
from distclip.policies.validate import initial_state, validate_policy
from distclip.report.summary import ReportMaker
from distclip.request import RequestMaker
from distclip.setup.build_plan import SetupInputs
from distclip.setup.late_parameters import LateParameters
from distclip.setup.options import ClipOptions
from distclip.setup.plan import Plan
from distclip.setup.steps_in_backward import told_of_steps
from distclip.torch_internals.hooks import optimizers_in_backward

# Where reading a number makes the host wait: there a step is judged one call late if it may be.
ASYNC_DEVICES = frozenset({"cuda"})


@dataclass(frozen=True, slots=True)
class Stages:
    """Made anew by `rebuild`."""

    inputs: SetupInputs
    plan: Plan
    assignments: tuple[PolicyAssignment, ...]
    initial: State  # the policies' states at the start
    layout: MessageLayout
    requests: RequestMaker
    measurer: LocalMeasurer
    units: UnitClipper | None
    bits: int  # of the norms that policies see
    in_total: list[bool] | None  # [groups]: which count in the total; None where all do
    in_total_mask: Tensor | None  # the same on the compute device
    checker: StepChecker
    applier: GradientApplier
    reports: ReportMaker
    clamped: frozenset[int]  # groups whose elements are clamped
    propagates: bool  # on_nonfinite="propagate"
    always_steps: bool  # every step is taken, whatever the norm
    hash_weights: list[list[int]]  # [2][groups]: of the decision's hash
    # on a device: all thresholds are constants, so that what the host must know at once it can
    # decide by itself
    decides_on_host: bool
    fixed: FixedOnDevice | None  # the kernel that decides by them, where the host does not

    @property
    def options(self) -> ClipOptions:
        return self.inputs.options

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    @property
    def kernels(self) -> str:
        """Which compute on this rank's gradients, if these have their parameters' dtypes:
        "triton", "native" or "torch". No host sync."""
        with suppress(ConfigError):  # the environment asks for some that are missing
            return kernels_for({param.dtype for param in self.inputs.members}, self.device)
        return "missing"

    @property
    def on_host(self) -> bool:
        """Numbers are read at once and are Python's from then on."""
        return self.layout.on_host


def build_stages(
    inputs: SetupInputs,
    channel: Channel,
    grad_of: GradOf | None,
    num_sinks: int,
    rank_norms: RankNorms | None = None,
) -> Stages:
    """A collective: a few small all-reduces.

    Args:
        num_sinks: how many there are on this rank; those of the first rank are written to.

    Raises:
        ConfigError: on all ranks alike: a policy answers otherwise than it must.
    """
    options, device, members = inputs.options, inputs.device, inputs.members
    plan, rules = inputs.plan, options.grouping.rules()
    on_host = device.type not in ASYNC_DEVICES
    facts = _agree_on_facts(inputs, num_sinks, grad_of, channel)
    bits = DOUBLE_BITS if facts.is_double else SINGLE_BITS
    said = told_of_steps(inputs.out_of_reach, facts.reaches_some or not facts.steps_early)
    if said:
        logging.getLogger("distclip").warning("GradClipper: %s", said)

    # Policies, and what they add to the message
    assignments = assign_policies(plan.groups, rules, options.policy, device)
    warnings = StepWarnings(assignments, facts.has_sinks)
    if not facts.is_trained:
        warnings.warn_untrained(sum(row.parameters for row in plan.rows))
    units = _build_units(channel, inputs, assignments, bits)
    num_policy_stats = sum(each.num_stats * len(each.groups) for each in assignments)
    num_stats = num_policy_stats + 2 * (units.num_split if units else 0)
    layout = _message_layout(plan, num_stats, channel.size, device, on_host, rank_norms is not None)
    if rank_norms is not None:
        rank_norms.use_norm(layout.norm)
    plan = replace(plan, words=layout.num_words)

    # How the policies answer, from norms of nothing
    initial = tuple(initial_state(each.policy, len(each.groups), device) for each in assignments)
    idle = idle_norms(layout, num_policy_stats, device)
    for assignment, state in zip(assignments, initial, strict=True):
        validate_policy(assignment.policy, idle.shown_to(assignment), state)
    clamped = decide(assignments, idle, initial)[0].clamped

    # Gradients, from parameters to sums
    modules, entries = inputs.scan.modules, inputs.scan.entries
    collector = GradientCollector(members, plan, entries, grad_of, layout, modules)
    late = LateParameters(modules, entries, collector.grad_of)
    by_tensor = not modules
    index = OptimizerIndex(members, plan.group_of, by_tensor, grad_of)
    propagates = options.on_nonfinite == "propagate"

    counts = groups_in_total(plan.groups, rules)
    in_total = None if all(counts) else counts
    mask = None if in_total is None else torch.tensor(in_total, device=device)
    tolerance = options.drift_tolerance
    if tolerance is not None:
        # a power sum moves p times as much as its norm: below p = 1 the tolerance shrinks with it
        tolerance *= min(1.0, options.norm_type)
    draw = Random(1)
    weights = [[draw.getrandbits(62) | 1 for _ in plan.groups] for _ in range(2)]
    constant = all(each.constant is not None for each in assignments)
    return Stages(
        inputs=inputs,
        plan=plan,
        assignments=assignments,
        initial=initial,
        layout=layout,
        requests=RequestMaker(index, device, propagates, on_host),
        measurer=LocalMeasurer(
            plan=plan,
            collector=collector,
            layout=layout,
            assignments=assignments,
            units=units,
            rank_norms=rank_norms,
            rank=channel.rank,
            rows=RowSums(plan, layout.norm, device) if plan.layer_rows else None,
            device=device,
            config=inputs.config,
            late_parameters=late,
            wrappers=inputs.wrappers,
        ),
        units=units,
        bits=bits,
        in_total=in_total,
        in_total_mask=mask,
        checker=StepChecker(
            channel=channel,
            plan=plan,
            streak=SkipStreak(options.on_nonfinite, options.skip_limit),
            tolerance=tolerance,
            device=device,
            config=inputs.config,
            warnings=warnings,
        ),
        applier=GradientApplier(plan, units, device),
        reports=ReportMaker(
            plan=plan,
            in_total=in_total,
            in_total_mask=mask,
            bits=bits,
            dtype=torch.float64 if facts.is_double else torch.float32,
            device=device,
        ),
        clamped=clamped,
        propagates=propagates,
        # a step that a policy may leave out is decided on the host at once, unless all optimizers
        # fold
        always_steps=propagates and not ever_skips(assignments, idle, initial),
        hash_weights=weights,
        decides_on_host=constant and len(plan.groups) <= FEW,
        fixed=fixed_on_device(layout, assignments, mask, bits, tolerance, propagates),
    )


def _build_units(
    channel: Channel, inputs: SetupInputs, assignments: Sequence[PolicyAssignment], bits: int
) -> UnitClipper | None:
    by_units = {
        group: each.policy
        for each in assignments
        if isinstance(each.policy, UnitPolicy)
        for group in each.groups
    }
    if not by_units:
        return None
    members, ranges, device = inputs.members, inputs.ranges, inputs.device
    return UnitClipper(channel, inputs.plan, members, ranges, by_units, bits, device)


def _message_layout(
    plan: Plan,
    num_stats: int,
    num_ranks: int,
    device: torch.device,
    on_host: bool,
    by_rank: bool,
) -> MessageLayout:
    shares = [1 / share.num_replicas for share in plan.shares]
    weights = [share.drift_weight for share in plan.shares]
    # a piece that watched layers cut is as many parts as it holds rows
    parts = [1 if rows is None else rows for rows in plan.layer_rows or [None] * len(shares)]
    layer_shares = [share for share, count in zip(shares, parts, strict=True) for _ in range(count)]
    layer_of = [first + row for first, count in zip(plan.layer_of, parts) for row in range(count)]
    return MessageLayout(
        norm_type=plan.norm_type,
        num_groups=len(plan.groups),
        num_layers=len(plan.layers),
        num_stats=num_stats,
        num_ranks=num_ranks,
        share=torch.tensor(shares, dtype=torch.float64, device=device),
        drift_weight=torch.tensor(weights, dtype=torch.float64, device=device),
        group_of=torch.tensor(plan.group_of, dtype=torch.int64, device=device),
        layer_of=torch.tensor(layer_of, dtype=torch.int64, device=device),
        layer_share=torch.tensor(layer_shares, dtype=torch.float64, device=device),
        on_host=on_host,
        num_rank_norms=num_ranks if by_rank else 0,
    )


class _AgreedFacts(NamedTuple):
    """Of all ranks."""

    is_double: bool  # some rank has float64 parameters
    has_sinks: bool  # the first rank has some
    is_trained: bool  # some rank has a parameter to train
    steps_early: bool  # some rank has one that is stepped inside backward()
    reaches_some: bool  # some rank has one to train that is not


def _agree_on_facts(
    inputs: SetupInputs, num_sinks: int, grad_of: GradOf | None, channel: Channel
) -> _AgreedFacts:
    """Set-up's last message."""
    members, device = inputs.members, inputs.device
    doubles = (torch.float64, torch.complex128)
    is_double = any(param.dtype in doubles for param in members)
    # a gradient may be given to a tensor, or lie elsewhere, that requires none
    is_trained = grad_of is not None or any(p.requires_grad or p.grad is not None for p in members)
    reaches_some = any(p.requires_grad and not optimizers_in_backward(p) for p in members)
    steps_early = bool(inputs.out_of_reach)
    own = _AgreedFacts(
        is_double=is_double,
        has_sinks=num_sinks > 0,
        is_trained=is_trained,
        steps_early=steps_early,
        reaches_some=reaches_some,
    )
    if channel.size == 1:
        return own
    words = torch.tensor(own, dtype=torch.int64, device="cpu")
    told = channel.gather_ints(words, device, "the set-up's last message")
    return _AgreedFacts(*map(bool, told.any(0)))._replace(has_sinks=bool(told[0, 1]))
