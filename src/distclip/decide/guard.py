"""Stage 6: finite? agreed? drifted? a streak? → go on, skip or raise, alike on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from distclip.errors import GradientError, NonFiniteError
from distclip.exchange.message import PRESENCE_TOLERANCE, Flags
from distclip.records import Culprit
from distclip.setup.options import OnNonfinite


class Verdict(Enum):
    """In the order in which they are judged."""

    DISAGREE = "ranks made different calls"
    FAULT = "a rank found something wrong"
    NONFINITE = "inf or NaN"
    PRESENCE_TOLERANCE = "only some holders have a gradient"
    DRIFT = "copies differ"
    FINE = "go on"


def judge(flags: Flags, tolerance: float | None) -> Verdict:
    """From numbers that are equal on every rank. Drift and presence are judged on finite steps
    only: one replica's NaN is a bad step."""
    if not flags.agreed:
        return Verdict.DISAGREE
    if flags.fault:
        return Verdict.FAULT
    if not flags.finite:
        return Verdict.NONFINITE
    if not abs(flags.ragged) <= PRESENCE_TOLERANCE:
        return Verdict.PRESENCE_TOLERANCE
    if tolerance is not None and not abs(flags.drift) <= tolerance * flags.total:
        return Verdict.DRIFT
    return Verdict.FINE


@dataclass(slots=True)
class Streak:
    """Steps in a row that were not taken."""

    mode: OnNonfinite
    limit: int
    length: int = 0

    def good(self) -> None:
        self.length = 0

    def bad(self, patient: bool) -> bool:
        """Counts a bad step; True if it must end in an error. `patient`: a scaler is looking for
        its scale, `raise` waits for the limit."""
        self.length += 1
        if self.mode == "propagate":
            return False
        return self.length > self.limit or (self.mode == "raise" and not patient)

    def spike(self) -> bool:
        """Counts a step that a policy left out; True if it must end in an error."""
        self.length += 1
        return self.length > self.limit

    def spike_error(self, step: int) -> GradientError:
        return GradientError(
            f"step {step}: {self.length} steps in a row were not taken (skip_limit={self.limit}), "
            f"the last ones because the policy left "
            "them out: the norm stays above what it expects. Lower the learning rate, look at the "
            "data, or let the policy admit larger "
            "norms"
        )

    def error(self, step: int, nonfinite: int, culprits: tuple[Culprit, ...]) -> NonFiniteError:
        many = (
            f" in {self.length} steps in a row (skip_limit={self.limit})" if self.length > 1 else ""
        )
        return NonFiniteError(
            f"step {step}: {_count(nonfinite)} not finite{many}: {_who(culprits)}. "
            "Look at the loss, the data and the learning rate of that step; on_nonfinite='skip' "
            "leaves such steps out"
        )

    def notice(
        self, step: int, nonfinite: int, culprits: tuple[Culprit, ...], patient: bool
    ) -> str:
        """Of the first bad step of a streak."""
        then = (
            "The loss scale is lowered; it finds its height by such steps, and further ones are "
            "not told (report.skips counts them)"
            if patient
            else "Told once a streak; sinks=[distclip.LoggingSink()] reports every step"
        )
        return (
            f"step {step} is skipped: {_count(nonfinite)} not finite: {_who(culprits)}. "
            f"{self._goes_on()}. {then}"
        )

    def spike_notice(self, step: int) -> str:
        """Of the first step of a streak that a policy left out."""
        return (
            f"step {step} is skipped: its norm is so far from those before that the policy leaves "
            f"it out. {self._goes_on()}. "
            "Told once a streak; sinks=[distclip.LoggingSink()] reports every step"
        )

    def _goes_on(self) -> str:
        return (
            f"Nothing was changed by it and training goes on; more than "
            f"skip_limit={self.limit} "
            f"such steps in a row are an error"
        )


def _who(culprits: tuple[Culprit, ...]) -> str:
    named = "; ".join(f"{c.parameter} on rank {c.rank}: {c.kind}" for c in culprits)
    return (
        named or "only their sum overflows, or it is of a parameter that the clipper does not know"
    )


def _count(tensors: int) -> str:
    return "1 gradient tensor is" if tensors == 1 else f"{tensors} gradient tensors are"
