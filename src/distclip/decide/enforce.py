"""The reduced message on the host: what is wrong is told the same way on every rank, by errors,
warnings and culprits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distclip.decide import audit
from distclip.decide.audit import GradFingerprint
from distclip.decide.decision import ClipDecision, StepStatus, ended
from distclip.decide.global_norms import GlobalNorms
from distclip.decide.guard import SkipStreak, StepVerdict, verdict_of
from distclip.decide.matters import NormWindow
from distclip.decide.notes import NoteBook
from distclip.decide.warn import StepWarnings
from distclip.errors import AgreementError, DistclipError
from distclip.exchange.channel import Channel, hash64
from distclip.kernels.tensor_list import TensorList
from distclip.measure.collect import GradientSet
from distclip.measure.local_sums import LocalMeasurement
from distclip.optimizers import unmanaged_params
from distclip.p_norm import norm_of
from distclip.records import Culprit, farthest_rank
from distclip.request import Request
from distclip.setup.plan import Plan
from distclip.values import smallest_of


@dataclass(slots=True)
class StepChecker:
    """Prepared at set-up.

    Args:
        tolerance: of drift, relative to the total power sum.
        config: the options as a text.
    """

    channel: Channel
    plan: Plan
    streak: SkipStreak
    tolerance: float | None
    device: torch.device
    config: str
    warnings: StepWarnings
    window: NormWindow = field(default_factory=NormWindow)
    notes: NoteBook = field(default_factory=NoteBook)

    def check(
        self,
        measurement: LocalMeasurement,
        norms: GlobalNorms,
        decision: ClipDecision,
        status: StepStatus,
        clip_rate: float,
        num_steps: int,
        late: bool = False,
    ) -> tuple[StepStatus, DistclipError | None]:
        """The status with what was found, alike on all ranks: whether the step matters, then all
        ranks' notes if some have any, and the culprits of a streak's first bad one; and the error
        that ends it, which all ranks raise once its report is written. None where it may go on.

        Raises by itself where there is no report to write: ranks made different calls, or some
        could not measure, so that the reduced sums are not the gradients'; `measure` and `audit`,
        whose reports go to no sink.

        Args:
            norms, decision, status: with Python's numbers, but for columns that are not looked at.
                The status is written to.
            clip_rate: share of the last steps that were clipped; num_steps: that it counts.
            late: whether it was taken is told already, by the status; else it is not if an error
                ends it.
        """
        request, step = measurement.request, measurement.step
        is_audit = request.operation == "audit"
        verdict = verdict_of(norms, None if is_audit else self.tolerance)
        if verdict is StepVerdict.DISAGREE:
            raise audit.disagreement_error(self.channel, self._doing(measurement), self.device)
        if request.error is not None:
            raise self.channel.tell_once(request.error)
        if verdict is StepVerdict.ERROR:
            errors, cause = measurement.errors, measurement.cause
            raise audit.gradient_error(self.channel, step, errors, self.device) from cause
        norm, error = float(norms.total), None
        if verdict in (StepVerdict.PARTIAL_GRADS, StepVerdict.DRIFT):
            if request.read_only:
                raise self._difference(measurement, norms)
            error = self._difference(measurement, norms)
        elif request.read_only:
            status.judged = True
            return status, None
        else:
            if request.steps_others or not norms.num_grads:
                self._warn_of_request(request, norms)
            if verdict is StepVerdict.NONFINITE:
                status.culprits, error = self._count_bad_step(measurement, int(norms.nonfinite))
                norm = math.nan
            else:
                error = self._count_finite_step(step, decision, clip_rate, num_steps)
        if error is not None:
            status = status if late else ended(status)
            status.ended_in = type(error).__name__
        ranks = norms.rank_norms
        outlier_rank = farthest_rank(list(map(float, ranks)))[0] if len(ranks) else None
        window, skipped = self.window, bool(status.skipped)
        status.matters, status.deviation = window.judge(norm, skipped, outlier_rank)
        if status.matters is not None and norms.notes:
            status.notes = self.notes.gather(self.channel, self.device)
        status.judged = True
        return status, error

    def _difference(self, measurement: LocalMeasurement, norms: GlobalNorms) -> AgreementError:
        """A collective: the error that names the copies that differ."""
        request, step = measurement.request, measurement.step
        grad_set, grads = measurement.grad_set, measurement.grads
        sums = None if grads is not None else measurement.power_sums
        try:
            self.compare_replicas(request, step, grad_set, grads, sums)
        except AgreementError as error:
            return error.with_traceback(None)  # its frames would hold the gradients, and it itself
        text = (
            f"step {step}: copies of {_things(request)} differ (drift "
            f"{float(norms.drift):.3g} of {float(norms.power_sum):.3g}), none alone by much"
        )
        return self.channel.tell_once(AgreementError(text))

    def _doing(self, measurement: LocalMeasurement) -> str:
        """What this rank did, for ranks that did not do the same."""
        request = measurement.request
        text = (
            f"at step {measurement.step}: {request.description}, after decision "
            f"{int(measurement.last_hash):04x}, options {hash64(self.config) & 0xFFFF:04x}"
        )
        if request.scaler.inv_scale is not None:
            text += f", scale {1 / float(request.scaler.inv_scale):g}"
        return text

    def _warn_of_request(self, request: Request, norms: GlobalNorms) -> None:
        if not norms.num_grads:
            self.warnings.warn_once(
                "nothing",
                "no parameter has a gradient on any rank: nothing was clipped. Call it after "
                "backward() and before zero_grad()",
            )
        if request.steps_others and not self.warnings.was_given("more"):
            more = unmanaged_params(request.optimizers)
            if more:
                all_alike = self.channel.size == 1  # this rank's optimizers
                self.warnings.warn_once("more", "; ".join(more), all_alike)

    def _count_finite_step(
        self, step: int, decision: ClipDecision, clip_rate: float, num_steps: int
    ) -> DistclipError | None:
        cosine = float(smallest_of(decision.cosine)) if decision.clamped else 1.0
        self.warnings.check_habits(clip_rate, num_steps, cosine)
        if not decision.skip:
            if self.streak.length:
                self.streak.reset()
        elif self.streak.count_spike():
            return self.channel.tell_once(self.streak.spike_error(step))
        elif self.streak.length == 1 and not self.warnings.has_sinks:
            self.warnings.warn(self.streak.spike_notice(step))
        return None

    def _count_bad_step(
        self, measurement: LocalMeasurement, nonfinite: int
    ) -> tuple[tuple[Culprit, ...], DistclipError | None]:
        """At the first of a streak and at the last that is allowed it reads this rank's sums on the
        host, and is a collective."""
        request, step = measurement.request, measurement.step
        backs_off = request.scaler.enabled or request.tolerate_backoff
        must_raise = self.streak.count_nonfinite(backs_off)
        culprits: tuple[Culprit, ...] = ()
        if self.streak.length == 1 or must_raise:
            sums, present = measurement.power_sums.tolist(), measurement.grad_set.mask.tolist()
            culprits = audit.gather_culprits(self.channel, self.plan, sums, present, self.device)
        if must_raise:
            return culprits, self.channel.tell_once(self.streak.error(step, nonfinite, culprits))
        propagates = self.streak.mode == "propagate"
        if self.streak.length == 1 and not propagates and not self.warnings.has_sinks:
            notice = self.streak.notice(step, nonfinite, culprits, backs_off)
            # a loss scale that is looked for makes such steps all the time: only the first is told
            if backs_off:
                self.warnings.warn_once("overflow", notice)
            else:
                self.warnings.warn(notice)
        return culprits, None

    def compare_replicas(
        self,
        request: Request,
        step: int,
        grad_set: GradientSet,
        grads: TensorList | None,
        power_sums: Tensor | None = None,
    ) -> None:
        """A collective, which reads on the host: AgreementError if copies differ, by fingerprints
        of the gradients, or by their norms where the gradients are gone already.

        Args:
            power_sums: [pieces] float64, for the norms; not needed with `grads`.
        """
        misplaced: frozenset[int] = frozenset()
        if grads is not None:
            misplaced = grad_set.misplaced
            here = zip(grad_set.unique, grads.tensors, strict=True)
            prints = {i: audit.fingerprint_of(grad) for i, grad in here}
        else:
            assert power_sums is not None
            squares = norm_of(power_sums, self.plan.norm_type).square().tolist()
            present = grad_set.mask.tolist()
            prints = {i: GradFingerprint(square) for i, square in enumerate(squares) if present[i]}
        audit.compare_replicas(
            self.channel,
            self.plan,
            prints,
            self.tolerance or 1e-5,
            step,
            self.device,
            _things(request),
            misplaced,
        )


def _things(request: Request) -> str:
    return "gradients" if request.target == "grad" else "parameters"
