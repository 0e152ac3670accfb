"""One step from top to bottom: measure → exchange → read norms → decide → check → remember →
report.

All of it happens before a gradient is touched. When the host reads differs between devices and
calls: `HostNow` reads the reduced message at once, and from there on numbers are Python's;
`DeviceLate` keeps them on the device, and the host reads what it must know afterwards, now or at
the next call.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

from distclip.apply.gradients import StepOutcome
from distclip.decide.decision import (
    ClipDecision,
    StepStatus,
    decide,
    ended,
    no_decision,
    resolve,
)
from distclip.decide.fixed_on_device import status_of
from distclip.decide.global_norms import GlobalNorms, read_norms
from distclip.decide.guard import is_fine
from distclip.decide.state import ClipperState
from distclip.errors import ConfigError, DistclipError, ExchangeError, GradientError
from distclip.exchange.channel import Channel
from distclip.exchange.message import CHECK_WORDS, Message
from distclip.exchange.readback import (
    NOTHING_KNOWN,
    HostVector,
    KnownNumbers,
    Readback,
    fill_in,
    pack_numbers,
)
from distclip.kernels.step_kernels import FixedStep
from distclip.measure.local_sums import LocalMeasurement
from distclip.report.writer import ReportWriter
from distclip.request import Request
from distclip.stages import Stages
from distclip.values import Number, smallest_of

# Of one step what the host has read, in place of what is on the device: by these it carries it out.
_HostStep: TypeAlias = tuple[Request, GlobalNorms, ClipDecision, StepStatus]
# What is left on the device until the next call, and what the host knows of it already.
_Enqueued: TypeAlias = tuple[GlobalNorms, ClipDecision, StepStatus, KnownNumbers]

# What captured graphs read at each replay: one may outlive its clipper, or what `rebuild()` leaves.
_READ_BY_GRAPHS: list[Any] = []


class StepRunner:
    """Made at set-up.

    Args:
        writer: learns what is found of a step that is judged late.
    """

    def __init__(
        self, channel: Channel, stages: Stages, state: ClipperState, writer: ReportWriter
    ) -> None:
        self._channel, self._stages, self._state = channel, stages, state
        self._now = HostNow(stages, state)
        self._late = None if stages.on_host else DeviceLate(stages, state, writer)
        # the host may know of a step one call later
        self.reads_late = self._late is not None
        self._device, self._on_cuda = stages.device, stages.device.type == "cuda"
        self._host_vector = HostVector(stages.layout.num_words)
        self._sends_from_host = channel.comm_device(stages.device).type == "cpu"
        self._has_rank_norms = stages.measurer.rank_norms is not None

    def finish(self, channel: Channel) -> None:
        """Judge a step that is left to be judged, unless the channel to go on with is of other
        ranks: those could not be asked about it. Raises as `run`; a collective where something was
        wrong."""
        if self._late is not None and channel.is_same(self._channel):
            self._late.check_previous()

    @property
    def is_capturing(self) -> bool:
        """Whether a CUDA graph is captured: then nothing is read on the host, at this call or
        later."""
        return self._on_cuda and torch.cuda.is_current_stream_capturing()

    def run(self, request: Request, allow_late: bool) -> StepOutcome:
        """A collective: one all-reduce.

        Args:
            allow_late: what the message says may be judged at the next call, since no optimizer
                moves on a bad step anyway.

        Returns:
            What to do, or the error to raise, on all ranks alike, once its report is written.

        Raises:
            AgreementError, GradientError, ConfigError: on all ranks alike, where this step has no
                report (`StepChecker.check`); NonFiniteError too, of the previous one, which is
                written.
        """
        stages, state = self._stages, self._state
        capturing = self.reads_late and self.is_capturing
        if capturing and not allow_late:
            raise ConfigError(
                f"{request.operation}() reads a number on the host, which a CUDA graph cannot "
                "capture; use step() with fused optimizers that fold, or on_nonfinite='propagate'"
            )
        if capturing and request.note is not None:
            raise ConfigError(
                f"{request.operation}(note=...) inside a CUDA graph: a replay takes no note of its "
                "own; leave it out there"
            )
        if self._late is not None and not capturing:
            self._late.check_previous()
        if self.reads_late and allow_late and request.optimizers and not stages.always_steps:
            # travels in the description: ranks that judge a step at different calls would wait for
            # each other
            request = replace(request, judged_late=True)

        timing = self._now
        if self._late is not None:
            timing = self._timing_of(self._late, request, allow_late, capturing)
        if self._has_rank_norms and stages.measurer.lacks_rank_norms(request):
            request = replace(request, reduced_nothing=True)

        # This rank's sums, and what is wrong here
        state.step += 1
        last_hash, notes = state.last_hash, stages.checker.notes
        if isinstance(last_hash, Tensor):  # what travels must outlast the next write
            last_hash = last_hash.clone()
        if request.note is not None:
            notes.keep(state.step, request.note)
        has_notes = bool(notes.kept) and notes.has_some(state.step)
        reads = self._late is not None and timing is self._now
        measurement, message = stages.measurer.measure(
            state.step, request, last_hash, has_notes, reads and self._channel.group is None
        )
        if capturing:
            if measurement.errors or request.error:  # nobody would read them later
                raise request.error or GradientError("; ".join(measurement.errors))
            tables = stages.layout, stages.fixed, stages.assignments, stages.in_total_mask
            _READ_BY_GRAPHS.append((tables, state, measurement.grad_set))

        # The one collective
        message = self._reduce(message, request, reads)

        # The same norms, and so the same decision, on every rank
        ready: FixedStep | None = None
        if isinstance(timing, DeviceLate) and self._fits_kernel(request):
            norms, decision, ready = timing.decide_fixed(message, request, allow_late)
            policies = state.policies
        else:
            norms = read_norms(
                message,
                stages.layout,
                stages.in_total,
                stages.in_total_mask,
                stages.units,
                stages.assignments,
                stages.bits,
            )
            decision, policies = decide(stages.assignments, norms, state.policies)
            if request.target == "param":
                decision = no_decision(norms)
            if request.target == "param" or request.reduced_nothing:
                norms = norms._replace(rank_norms=norms.rank_norms[:0])

        # Errors, warnings, culprits, and whether it matters; what becomes of the step
        grads, read = measurement.grads, None
        try:
            step = measurement, norms, decision
            if isinstance(timing, HostNow):
                status, error = timing.check(*step)
            else:
                status, error, read = timing.check(*step, ready, allow_late, capturing)
        except DistclipError:
            grads = measurement.grads = None  # the error's frames would hold them
            if not request.read_only:  # as one that is judged late, which was counted before
                status = resolve(decision, norms.finite, norms.finite, False, False)
                state.update(decision, policies, ended(status))
            raise
        if not request.read_only:
            state.update(decision, policies, status)
        report = stages.reports.make(norms, decision, status, state, request.read_only, capturing)
        if measurement.memory is not None:
            stages.measurer.spare_memory.append(measurement.memory)
        if read is not None:
            request, norms, decision, status = read
        return StepOutcome(
            request=request,
            decision=decision,
            finite=norms.finite,
            status=status,
            on_host=read is not None or timing is self._now,
            grad_set=measurement.grad_set,
            grads=grads,
            units=measurement.units,
            split_unit_coefs=norms.split_unit_coefs,
            report=report,
            ready=ready if read is None else None,
            error=error,
        )

    def _fits_kernel(self, request: Request) -> bool:
        """Whether the device's own kernel decides, where there is one."""
        is_usual = request.target == "grad" and not request.reduced_nothing
        return self._stages.fixed is not None and is_usual and request.error is None

    def _timing_of(
        self, late: DeviceLate, request: Request, allow_late: bool, capturing: bool
    ) -> HostNow | DeviceLate:
        """How this call is judged on a device, where the host decides by itself what it must know
        at once, until a call comes that is left to the device: one that is judged late, or with a
        scaler, whose scale is there, or inside a graph. From then on the counters are on the
        device, where replays find them, and until `rebuild` all calls are decided there."""
        state = self._state
        is_late = allow_late and (capturing or not request.read_only)
        is_left = request.scaler.enabled or is_late
        if is_left and state.on_host:
            if capturing and state.num_steps:
                raise ConfigError(
                    f"{request.operation}() inside a CUDA graph, and the clipper's counters are on "
                    "the host: before the capture take one step() with fused optimizers, or one "
                    "clip_() with on_nonfinite='propagate'"
                )
            state.move_to_device()
        return self._now if state.on_host else late

    def _reduce(self, message: Message, request: Request, reads: bool) -> Message:
        """`reads`: numbers come back as Python's."""
        channel, op = self._channel, self._stages.layout.norm.reduce_op
        what = f"{request.operation} at step {self._state.step}"
        if isinstance(message, Tensor):
            if channel.group is not None:
                message = message.to(channel.comm_device(self._device))
                channel.all_reduce_(message, op, what)
            return Readback.read_now(message) if reads else message.to(self._device)
        if channel.group is None:
            return message
        here = self._host_vector
        here.write(message)
        if self._sends_from_host:
            try:
                channel.all_reduce_(here.tensor, op, what)
            except ExchangeError:
                # what timed out may still write there
                self._host_vector = HostVector(self._stages.layout.num_words)
                raise
            return here.read()
        vector = here.tensor.to(channel.comm_device(self._device))
        return Readback.read_now(channel.all_reduce_(vector, op, what))


class HostNow:
    """Numbers are Python's: each step is checked before anything else happens. On a device too,
    where the host has to know at once and thresholds are constants: it waits for the message
    anyway, and then asks the device for nothing but the scaling."""

    def __init__(self, stages: Stages, state: ClipperState) -> None:
        self._stages, self._state = stages, state

    def check(
        self, measurement: LocalMeasurement, norms: GlobalNorms, decision: ClipDecision
    ) -> tuple[StepStatus, DistclipError | None]:
        """What becomes of the step and what was found, and the error in which it ends."""
        finite, read_only = norms.finite, measurement.request.read_only
        status = resolve(decision, finite, finite, read_only, self._stages.propagates)
        habits = self._state.history.clip_rate, self._state.num_steps
        return self._stages.checker.check(measurement, norms, decision, status, *habits)


class DeviceLate:
    """Numbers stay on the device, and one vector of them is read: now, where the host must know
    before anything is touched, else at the next call."""

    def __init__(self, stages: Stages, state: ClipperState, writer: ReportWriter) -> None:
        self._stages, self._state, self._writer = stages, state, writer
        self._late: Readback[tuple[LocalMeasurement, _Enqueued]] = Readback()

    def check_previous(self) -> None:
        """Judge what the previous call left; its step was not taken if it was bad."""
        late = self._late.dequeue()
        if late is None:
            return
        numbers, (measurement, there) = late
        norms, decision, status, rate, _ = self._read(numbers, *there)
        status, error = self._stages.checker.check(
            measurement, norms, decision, status, rate, self._state.num_steps, late=True
        )
        if not measurement.request.read_only:
            self._writer.add_findings(measurement.step, status)
        if error is not None:
            try:
                raise error
            except DistclipError:
                self._writer.flush()  # no call may follow that would
                raise
            finally:
                del error  # its traceback would hold this frame, and it the error

    def check(
        self,
        measurement: LocalMeasurement,
        norms: GlobalNorms,
        decision: ClipDecision,
        ready: FixedStep | None,
        allow_late: bool,
        capturing: bool,
    ) -> tuple[StepStatus, DistclipError | None, _HostStep | None]:
        """The same, and what was read. Where the step is judged at the next call nothing was found
        yet.

        Args:
            ready: of the kernel, where that has decided.
        """
        request = measurement.request
        if ready is not None:
            status = status_of(ready)
        else:
            if request.error is not None and bool(norms.agreed):
                allow_late = False  # all ranks made this mistake; others than its may judge it late
            tolerance = self._stages.checker.tolerance
            ok = is_fine(norms, tolerance) if allow_late else norms.finite
            status = resolve(decision, norms.finite, ok, request.read_only, self._stages.propagates)
        if allow_late:
            measurement.grads = None
        if allow_late and capturing:
            return status, None, None
        vector, known = (
            self._pack(request, norms, decision, status)
            if ready is None
            else (ready.vector, NOTHING_KNOWN)
        )
        if allow_late:
            self._late.enqueue(vector, (measurement, (norms, decision, status, known)))
            return status, None, None
        # one read, of everything that the host wants to know
        numbers = Readback.read_now(vector)
        norms, decision, here, rate, inv_scale = self._read(numbers, norms, decision, status, known)
        here, error = self._stages.checker.check(
            measurement, norms, decision, here, rate, self._state.num_steps
        )
        if request.scaler.inv_scale is not None:
            request = replace(request, scaler=request.scaler.with_inv_scale(inv_scale))
        status = here.with_flags_of(status if error is None else ended(status))
        return status, error, (request, norms, decision, here)

    def decide_fixed(
        self, message: Message, request: Request, allow_late: bool
    ) -> tuple[GlobalNorms, ClipDecision, FixedStep]:
        """By the kernel for constant thresholds."""
        fixed, scale = self._stages.fixed, request.scaler.inv_scale
        assert fixed is not None and isinstance(message, Tensor)
        assert scale is None or isinstance(scale, Tensor)
        rate = self._state.history.clip_rate
        return fixed.decide(message, scale, rate, request.read_only, allow_late)

    def _pack(
        self, request: Request, norms: GlobalNorms, decision: ClipDecision, status: StepStatus
    ) -> tuple[Tensor, KnownNumbers]:
        """What tells whether the step may be taken, what warnings look at, and the decision."""
        words: list[Number] = [getattr(norms, name) for name in CHECK_WORDS]
        scale, skip, coef = request.scaler.inv_scale, decision.skip, decision.coef
        cosine = smallest_of(decision.cosine) if decision.clamped else 1.0
        rate, ranks = self._state.history.clip_rate, norms.rank_norms
        assert isinstance(coef, Tensor) and isinstance(ranks, Tensor)
        left_out = False if skip is None else skip
        return pack_numbers(
            numbers=[*words, norms.total, rate, cosine, 1.0 if scale is None else scale],
            flags=[norms.agreed, norms.finite, left_out, status.clipped, status.skipped],
            columns=[coef, ranks],
        )

    def _read(
        self,
        read: list[float],
        norms: GlobalNorms,
        decision: ClipDecision,
        status: StepStatus,
        known: KnownNumbers,
    ) -> tuple[GlobalNorms, ClipDecision, StepStatus, float, float]:
        """The same three with Python's numbers in the place of what `_pack` packed, of cosines the
        least; the clip rate, and the loss scale's inverse."""
        numbers = iter(fill_in(known, read))
        checks = dict(zip(CHECK_WORDS, islice(numbers, len(CHECK_WORDS)), strict=True))
        total, rate, cosine, inv_scale = islice(numbers, 4)
        agreed, finite, left_out, clipped, skipped = map(bool, islice(numbers, 5))
        coefs = list(islice(numbers, self._stages.layout.num_groups))
        norms = norms._replace(
            **checks, agreed=agreed, finite=finite, total=total, rank_norms=list(numbers)
        )
        decision = decision._replace(coef=coefs, cosine=[cosine], skip=left_out)
        status = replace(status, ok=finite, skipped=skipped, clipped=clipped)
        return norms, decision, status, rate, inv_scale
