"""Stages 3 to 6 in a row: collect → measure → exchange → decide → guard, all of a call before a
gradient is touched."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from distclip.apply.gradients import HostDecision, Outcome
from distclip.decide.decision import StepFlags, decide, fate
from distclip.decide.enforce import Watched
from distclip.decide.state import ClipperState
from distclip.errors import ConfigError, GradientError
from distclip.exchange.channel import Channel
from distclip.exchange.readback import Readback
from distclip.measure.collect import Grads
from distclip.measure.local_sums import GlobalNorms, LocalMeasurement
from distclip.records import Culprit, Decision, Norms
from distclip.report.writer import Writer
from distclip.request import Request
from distclip.stages import Stages


class StepRunner:
    """Made at set-up.

    Args:
        writer: learns the culprits of a step that is judged late.
    """

    def __init__(self, channel: Channel, now: Stages, memory: ClipperState, writer: Writer) -> None:
        self._channel, self._now, self._memory, self._writer = channel, now, memory, writer
        self._propagates = now.options.on_nonfinite == "propagate"
        self._unjudged: Readback[LocalMeasurement] = Readback()
        self.may_wait = now.device.type == "cuda"  # elsewhere reading a number costs nothing

    def capturing(self) -> bool:
        """Whether a CUDA graph is captured: then nothing is read on the host, at this call or
        later."""
        return self._now.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def run(self, call: Request, may_wait: bool) -> Outcome:
        """A collective: one all-reduce.

        Args:
            may_wait: what the message says may be judged at the next call, since no optimizer moves
                on a bad step anyway.

        Raises:
            NonFiniteError, AgreementError, GradientError, ConfigError: on all ranks alike.
        """
        memory, capturing = self._memory, self.capturing()
        if capturing and not may_wait:
            raise ConfigError(
                f"{call.operation}() reads a number on the host, which a CUDA graph cannot "
                f"capture; use step() with fused optimizers that "
                "fold, or on_nonfinite='propagate'"
            )
        if not capturing:
            self._settle()
        memory.step += 1
        seen, message = self._now.sensor.sense(
            memory.step, call, memory.last(reads=not self.may_wait)
        )
        if capturing and (seen.faults or call.problem):  # nobody would read them from the message
            raise call.problem or GradientError("; ".join(seen.faults))
        message = self._exchanged(message, call)

        reduced = self._now.sensor.read(message)
        decision, state = decide(self._now.parts, reduced.norms, memory.states())
        if call.of == "param":
            decision = _nothing_to_do(decision, reduced.norms)
        late, finite = self.may_wait and may_wait, reduced.norms.finite
        go = self._now.wire.go(message, reduced.power, self._now.tolerance) if late else finite
        will = fate(decision, finite, go, call.passive, self._propagates)

        grads, known, culprits = seen.grads or Grads.none(), None, tuple[Culprit, ...]()
        if late:
            seen.grads = None
            if not capturing:
                self._unjudged.leave(self._told_late(message, reduced, decision), seen)
        else:
            known, culprits = self._told(seen, message, reduced, decision, will)
        fine = None if known is None else known.fine
        if not call.passive:
            memory.remember(decision, state, will, fine, reads=not self.may_wait)
        report = self._now.summary.of(
            memory.step, reduced, decision, will, memory.rate, memory.history.skips.clone(), culprits, memory.taken, call.passive,
            fine=bool(fine),
        )  # fmt: skip
        return Outcome(
            decision,
            grads,
            finite,
            will.skipped,
            will.overflow,
            reduced.cut,
            seen.units,
            known,
            report,
        )

    def _exchanged(self, message: Tensor, call: Request) -> Tensor:
        there = message.to(self._channel.comm_device(self._now.device))
        op = "sum" if math.isfinite(self._now.options.norm_type) else "max"
        return self._channel.reduce_(there, op, f"{call.operation} at step {self._memory.step}").to(
            self._now.device
        )

    def _told(
        self,
        seen: LocalMeasurement,
        message: Tensor,
        reduced: GlobalNorms,
        decision: Decision,
        will: StepFlags,
    ) -> tuple[HostDecision, tuple[Culprit, ...]]:
        """Reads on the host, in one go, what all ranks agreed on, and judges it."""
        call, none = seen.call, reduced.power  # a stand-in for what there is not
        cosine = decision.cosine.amin() if decision.clamped else none
        (power,), rest, coefs, (acts,), (rate,), (left,), (inverse,), (least,) = Readback.now(
            reduced.power, self._now.wire.rest(message), decision.coef, will.clipped, self._memory.rate,
            none if decision.skip is None else decision.skip, none if call.hands.inverse is None else call.hands.inverse, cosine,
        )  # fmt: skip
        flags, left_out = (
            self._now.wire.flags(power, rest),
            decision.skip is not None and bool(left),
        )
        watched = Watched(left_out, rate, least if decision.clamped else 1.0)
        culprits = self._now.judge.judge(seen, flags, watched, self._memory.taken)
        finite = flags.finite
        skip = not call.passive and (left_out if finite else not self._propagates)
        scale = 1.0 if call.hands.inverse is None else inverse
        return HostDecision(
            coefs if finite else [1.0] * len(coefs), scale, bool(acts), skip, finite and not skip
        ), culprits

    def _told_late(self, message: Tensor, reduced: GlobalNorms, decision: Decision) -> Tensor:
        """The same for the next call, which judges it: float64, read by `_settle`."""
        left_out = (
            torch.zeros_like(reduced.power) if decision.skip is None else decision.skip.double()
        )
        watched = (left_out, self._memory.rate, decision.cosine.amin())
        return torch.cat([self._now.wire.rest(message), torch.stack([reduced.power, *watched])])

    def _settle(self) -> None:
        """Judge what the previous call left; its step was not taken if it was bad."""
        late = self._unjudged.taken()
        if late is not None:
            *rest, power, left_out, rate, cosine = late.numbers
            watched = Watched(bool(left_out), rate, cosine)
            self._writer.amend(
                self._now.judge.judge(
                    late.what, self._now.wire.flags(power, rest), watched, self._memory.taken
                )
            )


def _nothing_to_do(decision: Decision, norms: Norms) -> Decision:
    """For norms of parameters, of which nothing is clipped."""
    one = torch.ones_like(norms.per_group)
    return replace(
        decision, coef=one, threshold=one * math.inf, clipped=one < 1, norms_after=norms.per_group, cosine=one, skip=None
    )  # fmt: skip
