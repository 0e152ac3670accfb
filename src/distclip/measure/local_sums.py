"""This rank's part of the message.

Whatever goes wrong here travels in it as a count, and its text is told afterwards, so that no rank
waits for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distclip.errors import GradientError
from distclip.exchange.channel import hash64
from distclip.exchange.message import Message, MessageLayout
from distclip.kernels.reference import SUMMED
from distclip.kernels.tensor_list import TensorList
from distclip.measure.collect import GradientCollector, GradientSet
from distclip.measure.rank_norms import RankNorms
from distclip.measure.rows import RowSums
from distclip.measure.units import UnitClipper, UnitMeasurement
from distclip.optimizers import params_added_later, params_without_plan
from distclip.policies.assignment import PolicyAssignment
from distclip.policies.policy import LocalGrads, LocalStats, UnitPolicy
from distclip.policies.validate import validate_stats
from distclip.request import Request
from distclip.setup.late_parameters import LateParameters
from distclip.setup.placement import DEVICES
from distclip.setup.plan import Plan
from distclip.setup.unfinished_backward import ReducingWrapper, unfinished_errors
from distclip.torch_internals.dtensor import local_tensor
from distclip.values import Number, as_tensor, multiply


@dataclass(slots=True)
class LocalMeasurement:
    """What one call measured on this rank; kept until it is judged."""

    step: int
    request: Request
    last_hash: Number  # of the decision before
    grad_set: GradientSet  # what is there; all parameters where nobody could look
    own_sums: Tensor | None = None  # [unique] float64: power sums; None where nothing could be
    grads: TensorList | None = None  # of the set's `unique` pieces; None once they may have changed
    errors: list[str] = field(default_factory=list)  # what this rank found wrong
    cause: Exception | None = None  # the exception among them
    units: UnitMeasurement | None = None
    # [parts] float64: power sums of what watched layers cut; None where nothing is cut here
    part_sums: Tensor | None = None
    memory: Tensor | None = None  # of the power sums, for a later call once this one is over

    @property
    def power_sums(self) -> Tensor:
        """[pieces] float64, 0 where there is no gradient, or nothing could be measured."""
        if self.own_sums is None:
            return torch.zeros_like(self.grad_set.mask)
        return self.grad_set.in_places(self.own_sums)


@dataclass(slots=True)
class LocalMeasurer:
    """Prepared at set-up.

    Args:
        rows: of the pieces that watched layers cut; None where this rank has none.
        rank_norms, rank: of each rank by itself, and this one's place; None where not asked for.
        config: the options as a text, equal on all ranks.
        wrappers: modules that may leave gradients unfinished.
    """

    plan: Plan
    collector: GradientCollector
    layout: MessageLayout
    assignments: Sequence[PolicyAssignment]
    units: UnitClipper | None
    rows: RowSums | None
    rank_norms: RankNorms | None
    rank: int
    device: torch.device
    config: str
    late_parameters: LateParameters
    wrappers: Sequence[ReducingWrapper]
    _zeros: Tensor = field(init=False)  # [pieces]
    _num_replicas: list[int] = field(init=False)  # [pieces]
    _here: Tensor = field(init=False)  # [ranks] bool: this one, where ranks' norms are asked for
    # what calls that are over put their power sums into; append and pop are atomic
    spare_memory: list[Tensor] = field(init=False, default_factory=lambda: [])
    _stepped: int = field(init=False, default=0)  # RankNorms' round of the last step
    _all_parameters: GradientSet = field(init=False)
    _config_hash: int = field(init=False)

    def __post_init__(self) -> None:
        self._zeros = torch.zeros(len(self.plan.pieces), dtype=torch.float64, device=self.device)
        self._num_replicas = [share.num_replicas for share in self.plan.shares]
        here = [i == self.rank for i in range(self.layout.num_rank_norms)]
        self._here = torch.tensor(here, dtype=torch.bool, device="cpu").to(self.device)
        self._all_parameters = self.collector.all_parameters()
        self._config_hash = hash64(self.config)
        if self.rank_norms is not None:
            self._stepped = self.rank_norms.last_stepped

    def lacks_rank_norms(self, request: Request) -> bool:
        """Whether norms of ranks are asked for, and none is there: what was reduced belongs to a
        step before. Ranks must agree on it, since it changes what their reports hold."""
        if self.rank_norms is None or request.target == "param":
            return False
        return not self.rank_norms.has_since(self._stepped)

    def measure(
        self, step: int, request: Request, last_hash: Number, has_notes: bool, reads: bool = False
    ) -> tuple[LocalMeasurement, Message]:
        """The measurement and this rank's message. Never communicates, raises nothing.

        Args:
            has_notes: this rank has notes, should the step matter.
            reads: as for `MessageLayout.pack`.
        """
        out = LocalMeasurement(step, request, last_hash, self._all_parameters)
        if self.rows is not None:
            out.part_sums = self._zeros.new_zeros(self.rows.num_parts)
        stats: Tensor | None = None
        found_inf: Number | None = None
        if self.layout.num_stats:
            stats = self._zeros.new_zeros(self.layout.num_stats)
        try:
            grad_set, grads, out.errors = self._collect(request)
            # also where something is wrong: a step that is taken all the same clips them everywhere
            out.grad_set, out.grads = grad_set, grads
            if grads is not None and not out.errors and request.error is None:
                own, out.part_sums = self._power_sums(grad_set, grads, request, out)
                if request.scaler.enabled or request.steps_others:
                    found_inf = request.found_inf(self.device, self.layout.on_host)
                if request.target == "grad" and stats is not None:
                    out.units = self._add_stats(stats, grad_set, grads, request)
                out.own_sums = own
        except Exception as error:
            out.errors = [*out.errors, f"{type(error).__name__}: {error}"]
            out.cause = error
        # 16 bits each that must be equal on all ranks: the call counter, what is called with which
        # options, and the last decision
        called = (hash64(request.description) ^ self._config_hash) & 0xFFFF
        tokens = [float(step & 0xFFFF), float(called), last_hash]
        own, grad_set = out.own_sums, out.grad_set
        totals = None if own is None else grad_set.totals
        message = self.layout.pack(
            out.power_sums if own is None or totals is None else own,
            stats,
            self._no_presence() if own is None else grad_set.presence,
            found_inf,
            bool(out.errors or request.error),
            has_notes,
            tokens,
            totals,
            request.scaler.inv_scale,
            out.part_sums,
            None if self.rank_norms is None else self._own_norm(self.rank_norms, request),
            reads,
        )
        return out, message

    def _own_norm(self, rank_norms: RankNorms, request: Request) -> Tensor:
        """[ranks]: of this rank before the reduction, in its place. A step uses it up."""
        nothing = self._zeros.new_zeros(self.layout.num_rank_norms)
        if request.target == "param" or request.reduced_nothing:
            return nothing
        norm = rank_norms.take(self.layout.norm, self.device, request.factor())
        if not request.read_only:
            self._stepped = rank_norms.last_stepped = rank_norms.round
        return torch.where(self._here, norm, nothing)

    def _collect(self, request: Request) -> tuple[GradientSet, TensorList | None, list[str]]:
        """As `GradientCollector.collect`: the gradients, or parameters; None where gradients are
        not where they will be."""
        of_params = request.target == "param"
        if not of_params:
            errors = unfinished_errors(self.wrappers) if self.wrappers else []
            if errors:
                return self._all_parameters, None, errors
        collect = self._parameters if of_params else self.collector.collect
        grad_set, grads, errors = collect()
        # what stands first names the parameter; what follows from it is not reported
        errors = errors or self.late_parameters.late_errors(of_params=of_params)
        if request.steps_others and not errors:
            errors = params_added_later(request.optimizers)
        if self.rank_norms is not None and not of_params and not errors:
            any_grads, has_some = bool(grad_set.indices), not request.reduced_nothing
            errors = self.rank_norms.errors(any_grads, has_some)
        if not errors:
            if request.steps_others:
                errors = params_without_plan(request.optimizers, self.plan.pieces)
            if request.scaler.enabled:
                errors = errors + request.still_scaled(grad_set.indices, self.plan.pieces)
        return grad_set, grads, errors

    def _parameters(self) -> tuple[GradientSet, TensorList, list[str]]:
        """All parameters, as if they were gradients."""
        local = [local_tensor(p.detach()) for p in self.collector.members]
        for piece, tensor in zip(self.plan.pieces, local, strict=True):
            if tensor.dtype not in SUMMED or tensor.device.type not in DEVICES:
                raise GradientError(
                    f"measure(of='param'): {piece.name} is "
                    f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}, of which no "
                    "norm can be computed; build a clipper of the parameters that have one"
                )
        return self._all_parameters, TensorList.of(local), []

    def _power_sums(
        self, grad_set: GradientSet, grads: TensorList, request: Request, out: LocalMeasurement
    ) -> tuple[Tensor, Tensor | None]:
        """[unique] float64, unscaled; and [parts] where some are cut into rows. Perhaps in memory
        that `out` is given for it."""
        unique, rows = grad_set.unique, self.rows
        if not grads.tensors:
            return self._zeros[:0], None if rows is None else self._zeros.new_zeros(rows.num_parts)
        norm = self.layout.norm
        tensors = grads if rows is None else rows.split(grad_set, grads)
        # gradients may be elsewhere by now than parameters were at set-up
        if self.layout.on_host and tensors.tensors[0].is_cpu:
            out.memory = self._memory_for(len(tensors.tensors))
        own = tensors.power_sums(norm.p, out.memory)
        if own.device != self.device:
            own = own.to(self.device)
        if rows is None and grad_set.portion is None and request.leaves_grads:
            return own, None
        owner = None if rows is None else rows.owner_of(unique)
        portion = grad_set.portion
        if portion is not None and not norm.is_max:
            own = own * (portion if owner is None else portion[owner])
        factors: Any = request.power_factors(unique, norm)
        if isinstance(factors, list):
            factors = as_tensor(factors, torch.float64, self.device)
        if factors is not None:
            each = isinstance(factors, Tensor) and factors.ndim > 0
            own = own * (factors[owner] if each and owner is not None else factors)
        if rows is None:
            return own, None
        return rows.of_grads(own, unique), rows.in_places(own, unique)

    def _memory_for(self, size: int) -> Tensor:
        """[size] float64 on the CPU, with anything in it. torch's allocation would be a fifteenth
        of a small step."""
        try:
            memory = self.spare_memory.pop()
            if memory.numel() == size:
                return memory
        except IndexError:
            pass
        with torch.inference_mode(False):  # it is written again outside of that
            return torch.empty(size, dtype=torch.float64, device="cpu")

    def _no_presence(self) -> Message:
        """Of a rank that could not look."""
        return multiply(self._all_parameters.presence, 0.0)

    def _add_stats(
        self, stats: Tensor, grad_set: GradientSet, grads: TensorList, request: Request
    ) -> UnitMeasurement | None:
        """What policies want to know besides the norm, put into `stats`."""
        pieces, common = grad_set.unique, request.common_factor
        if common is None or isinstance(common, Tensor):
            factors = as_tensor(request.grad_factors(pieces), torch.float64, self.device)
        else:  # made on the device: what is made from a list would have to be sent
            factors = self._zeros.new_full((len(pieces),), common)
        units = None
        if self.units is not None:
            units = self.units.measure_units(grad_set, grads, factors)
            stats[self.layout.num_stats - 2 * self.units.num_split :] = units.words.flatten()
        for assignment in self.assignments:
            policy = assignment.policy
            if units is not None and isinstance(policy, UnitPolicy):
                stats[assignment.stats] = units.table[assignment.index].flatten()
            elif isinstance(policy, LocalStats):
                own = self._grads_of(assignment, grad_set, grads, factors)
                stats[assignment.stats] = validate_stats(assignment, policy.local_stats(own))
        return units

    def _grads_of(
        self,
        assignment: PolicyAssignment,
        grad_set: GradientSet,
        grads: TensorList,
        factors: Tensor,
    ) -> LocalGrads:
        """The gradients of one policy's groups."""
        selection = grad_set.select(assignment.groups, self._num_replicas, self.device)
        positions = selection.positions
        if len(positions) < len(grads.tensors):
            grads = TensorList.of([grads.tensors[n] for n in positions])
        return LocalGrads(
            grads=grads,
            group=selection.group,
            share=selection.share,
            scale=factors[selection.at],
            groups=len(assignment.groups),
            norm_type=self.layout.norm_type,
        )
