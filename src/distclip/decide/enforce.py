"""Stage 6b: the reduced message on the host. What is wrong is told alike on every rank: names,
culprits, errors and warnings."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from distclip.decide import audit
from distclip.decide.guard import Streak, Verdict, judge
from distclip.decide.history import WINDOW
from distclip.errors import AgreementError, GradientError
from distclip.exchange.channel import Channel, hash64
from distclip.exchange.message import Flags, MessageLayout
from distclip.exchange.readback import Readback
from distclip.measure.local_sums import LocalMeasurement
from distclip.optimizers import unmanaged_params
from distclip.p_norm import norm_of
from distclip.policies import describe
from distclip.policies.assignment import PolicyAssignment
from distclip.records import Culprit
from distclip.setup.plan import Plan

ALWAYS = 0.95  # of the last WINDOW steps clipped: a threshold that sets the length of steps
BENT = 0.9  # cosine below which value clipping changes the direction


class Watched(NamedTuple):
    """What is read on the host beside the message."""

    left_out: bool  # by the policy
    rate: float  # share of the steps before this one that were clipped
    cosine: float  # the least one, between raw and clamped gradients


@dataclass(slots=True)
class StepChecker:
    """Prepared at set-up."""

    channel: Channel
    plan: Plan
    wire: MessageLayout
    parts: Sequence[PolicyAssignment]
    streak: Streak
    tolerance: float | None
    device: torch.device
    config: str
    heard: bool  # the first rank has sinks, which report each step
    _told: set[str] = field(default_factory=set[str])  # warnings that were given

    def judge(
        self, seen: LocalMeasurement, flags: Flags, watched: Watched, taken: int
    ) -> tuple[Culprit, ...]:
        """Raises on all ranks alike, or returns the culprits of a first bad step. `taken`: steps
        that `watched.rate` counts."""
        call, step = seen.call, seen.step
        verdict = judge(flags, None if call.operation == "audit" else self.tolerance)
        if verdict is Verdict.DISAGREE:
            doing = (
                f"at step {step}: {call.text}, after decision {int(seen.last):04x}, options "
                f"{hash64(self.config) & 0xFFFF:04x}"
            )
            if call.hands.inverse is not None:
                doing += f", scale {1 / float(call.hands.inverse):g}"
            raise audit.name_disagreement(self.channel, doing, self.device)
        if call.problem is not None:
            raise call.problem
        if verdict is Verdict.FAULT:
            raise GradientError(
                f"step {step}: " + audit.name_faults(self.channel, seen.faults, self.device)
            )
        if verdict in (Verdict.PRESENCE_TOLERANCE, Verdict.DRIFT):
            self.compare(seen)
            raise AgreementError(
                f"step {step}: copies of {_things(seen)} differ (drift {flags.drift:.3g} of "
                f"{flags.total:.3g}), none alone by much"
            )
        if call.passive:
            return ()
        if not flags.present:
            self._warn(
                "nothing",
                "no parameter has a gradient on any rank: nothing was clipped. Call it after "
                "backward() and before zero_grad()",
            )
        if "more" not in self._told and (more := unmanaged_params(call.owned)):
            self._warn("more", "; ".join(more))
        if verdict is not Verdict.NONFINITE:
            self._notice(watched, taken)
            if not watched.left_out:
                self.streak.good()
            elif self.streak.spike():
                raise self.streak.spike_error(step)
            elif self.streak.length == 1 and not self.heard:
                self._say(self.streak.spike_notice(step))
            return ()
        patient = call.hands.enabled or call.patient
        must_raise = self.streak.bad(patient)
        culprits: tuple[Culprit, ...] = ()
        if self.streak.length == 1 or must_raise:
            culprits = audit.name_culprits(
                self.channel, self.plan, Readback.now(seen.sums)[0], self.device
            )
        if must_raise:
            raise self.streak.error(step, int(flags.bad), culprits)
        if self.streak.length == 1 and self.streak.mode != "propagate" and not self.heard:
            self._tell_skip(step, int(flags.bad), culprits, patient)
        return culprits

    def _tell_skip(
        self, step: int, nonfinite: int, culprits: tuple[Culprit, ...], patient: bool
    ) -> None:
        """Nobody else tells of it. A loss scale that is looked for makes such steps all the time:
        then only the first is told."""
        if patient:
            self._warn("overflow", self.streak.notice(step, nonfinite, culprits, patient))
        else:
            self._say(self.streak.notice(step, nonfinite, culprits, patient))

    def compare(self, seen: LocalMeasurement) -> None:
        """A collective: AgreementError if copies differ, by fingerprints of the gradients, or by
        their norms where they are gone."""
        tolerance, otherwise = (
            self.tolerance or 1e-5,
            () if seen.grads is None else seen.grads.present.otherwise,
        )
        audit.compare_replicas(
            self.channel,
            self.plan,
            self._prints(seen),
            tolerance,
            seen.step,
            self.device,
            _things(seen),
            otherwise,
        )

    def _prints(self, seen: LocalMeasurement) -> audit.Prints:
        if seen.grads is not None:
            here = zip(seen.grads.present.own, seen.grads.list.tensors, strict=True)
            return {i: audit.fingerprint(grad) for i, grad in here}
        squares, present = Readback.now(norm_of(seen.sums, self.wire.norm_type).square(), seen.has)
        return {i: (squares[i], 0.0) for i, has in enumerate(present) if has}

    def _notice(self, watched: Watched, taken: int) -> None:
        """What is allowed and seldom meant."""
        chosen = None
        if taken >= WINDOW and watched.rate > ALWAYS:
            chosen = next(
                (part.policy for part in self.parts if getattr(part.policy, "chosen", False)), None
            )
        if chosen is not None:
            self._warn(
                "always",
                f"{100 * watched.rate:.0f} % of the last {WINDOW} steps were clipped by "
                f"{describe(chosen)}: a threshold below nearly every "
                "norm does not catch outliers but sets the length of every step, like a smaller "
                "learning rate, and may starve learning. "
                "Raise it (`distclip suggest RUN.jsonl` shows what others would do), or use "
                "distclip.Normalize if that is meant",
            )
        if watched.cosine < BENT:
            self._warn(
                "bent",
                f"value clipping turned the gradient: its cosine with the raw one is "
                f"{watched.cosine:.2f}. Raise clip_value, or clip the "
                "norm (max_norm=...), which keeps the direction",
            )

    def _warn(self, kind: str, text: str) -> None:
        """Each kind once."""
        if kind not in self._told:
            self._told.add(kind)
            self._say(text)

    def _say(self, text: str) -> None:
        warnings.warn(text, RuntimeWarning, stacklevel=user_stacklevel())


def user_stacklevel() -> int:
    """The stack level, seen from the caller, of the first frame that is neither distclip's nor
    torch's: the user's line."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] in (
        "distclip",
        "torch",
    ):
        frame, level = frame.f_back, level + 1
    return level


def _things(seen: LocalMeasurement) -> str:
    return "gradients" if seen.call.of == "grad" else "parameters"
