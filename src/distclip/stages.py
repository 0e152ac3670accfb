"""Stage 2c: what every step uses, made once from the agreed plan."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distclip.apply.gradients import GradientApplier
from distclip.decide.decision import decide, may_skip
from distclip.decide.enforce import StepChecker
from distclip.decide.guard import Streak
from distclip.exchange.channel import Channel
from distclip.exchange.message import MessageLayout, num_check_words
from distclip.measure.collect import Collector, GradOf
from distclip.measure.local_sums import LocalMeasurer
from distclip.measure.units import Units
from distclip.optimizers import OptimizerIndex
from distclip.policies.assignment import PolicyAssignment, in_total, split
from distclip.policies.state import State
from distclip.policies.validate import initial_state, validate_policies
from distclip.records import Norms
from distclip.report.summary import Summary
from distclip.setup.build_plan import Reading
from distclip.setup.late_parameters import LateParameters
from distclip.setup.options import Options
from distclip.setup.plan import Plan
from distclip.torch_internals.join import UnevenInputs

# Policies see norms of so many bits: what the parameters' precision warrants, less those that
# depend on the order of a sum.
SINGLE, DOUBLE = 24, 48


@dataclass(frozen=True, slots=True)
class Stages:
    """Made anew by `rebuild`."""

    options: Options
    plan: Plan
    members: list[Tensor]  # [pieces] the parameters
    device: torch.device  # where is computed
    tolerance: float | None  # of drift, relative to the total power sum
    parts: tuple[PolicyAssignment, ...]
    first: State  # the policies' states at the start
    wire: MessageLayout
    sensor: LocalMeasurer
    judge: StepChecker
    actor: GradientApplier
    summary: Summary
    owners: OptimizerIndex
    alike: list[frozenset[int]]  # [groups] identities of the parameters
    clamped: frozenset[int]  # groups whose elements are clamped
    uneven: UnevenInputs
    propagates: bool  # every step is taken, whatever the norm
    mixers: Tensor  # [2, groups] int64: of the decision's hash


def prepare(reading: Reading, channel: Channel, grad_of: GradOf | None, sinks: int) -> Stages:
    """A collective: a few small all-reduces.

    Args:
        sinks: how many there are on this rank; those of the first rank are written to.

    Raises:
        ConfigError: on all ranks alike: a policy answers otherwise than it must.
    """
    options, device, plan, members = reading.options, reading.device, reading.plan, reading.members
    p, rules = options.norm_type, options.grouping.rules()
    parts = split(plan.groups, rules, options.policy, device)
    by_units = {
        g: part.policy for part in parts if hasattr(part.policy, "unit_coefs") for g in part.groups
    }
    wide, heard = _agreed(members, sinks, channel, device)
    dtype, bits = (torch.float64, DOUBLE) if wide else (torch.float32, SINGLE)
    units = None
    if by_units:
        units = Units(channel, plan, members, reading.ranges, by_units, bits, device)  # pyright: ignore[reportArgumentType]
    stats = sum(part.words * len(part.groups) for part in parts) + 2 * (units.cut if units else 0)
    plan = replace(plan, words=len(plan.groups) + len(plan.layers) + num_check_words(p, stats))
    wire = _wire(plan, stats, channel, device)
    in_sum = in_total(plan.groups, rules)
    counted = None if all(in_sum) else torch.tensor(in_sum, device=device)
    collector = Collector(members, plan.pieces, reading.found.slots, grad_of, device)
    newcomers = LateParameters(reading.found.modules, reading.found.slots, collector.grad_of)
    sensor = LocalMeasurer(
        plan,
        collector,
        wire,
        parts,
        units,
        counted,
        device,
        reading.config,
        bits,
        newcomers,
        reading.wrappers,
    )
    first = tuple(initial_state(part.policy, len(part.groups), device) for part in parts)
    idle = _idle(wire.groups, sensor.policy_words, p, device)
    validate_policies(parts, idle, first)
    decision = decide(parts, idle, first)[0]
    # a power sum moves p times as much as its norm: below p = 1 the tolerance shrinks with it
    tolerance = options.drift_tolerance and options.drift_tolerance * min(1.0, p)
    streak = Streak(options.on_nonfinite, options.skip_limit)
    draw = torch.Generator().manual_seed(1)
    return Stages(
        options, plan, members, device, tolerance, parts, first, wire, sensor,
        StepChecker(channel, plan, wire, parts, streak, tolerance, device, reading.config, heard),
        GradientApplier(plan, units, wire.group),
        Summary(plan, options.watch, counted, torch.zeros(0, dtype=dtype, device=device)),
        OptimizerIndex(members, plan.group_of, by_tensor=not reading.found.modules),
        [frozenset(id(members[i]) for i, g in enumerate(plan.group_of) if g == group) for group in range(wire.groups)],
        decision.clamped,
        reading.uneven,
        # a step that a policy may leave out is decided on the host at once, unless all optimizers
        # fold
        options.on_nonfinite == "propagate" and not may_skip(parts, idle, first),
        torch.randint(1 << 62, (2, wire.groups), generator=draw, device="cpu").bitwise_or(1).to(device),
    )  # fmt: skip


def _wire(plan: Plan, stats: int, channel: Channel, device: torch.device) -> MessageLayout:
    return MessageLayout(
        plan.norm_type, len(plan.groups), len(plan.layers), stats, channel.size,
        torch.tensor([1 / share.holders for share in plan.shares], dtype=torch.float64, device=device),
        torch.tensor([share.weight for share in plan.shares], dtype=torch.float64, device=device),
        torch.tensor(plan.group_of, dtype=torch.int64, device=device),
        torch.tensor(plan.layer_of, dtype=torch.int64, device=device),
    )  # fmt: skip


def _idle(groups: int, words: int, p: float, device: torch.device) -> Norms:
    """Norms of nothing, to hear how policies answer."""
    nothing = torch.zeros(groups, dtype=torch.float64, device=device)
    return Norms(
        nothing,
        nothing.sum(),
        nothing.sum() == 0,
        nothing.sum().long(),
        nothing.new_zeros(words),
        p,
    )


def _agreed(
    members: list[Tensor], sinks: int, channel: Channel, device: torch.device
) -> tuple[bool, bool]:
    """Whether some rank has float64 parameters, and whether the first rank has sinks. Set-up's last
    message."""
    wide = any(param.dtype in (torch.float64, torch.complex128) for param in members)
    if channel.size == 1:
        return wide, bool(sinks)
    own = torch.tensor([int(wide), int(sinks > 0)], device="cpu")
    told = channel.gather_ints(own, device, "the set-up's choice of the report's dtype")
    return bool(told[:, 0].any()), bool(told[0, 1])
