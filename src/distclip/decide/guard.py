"""Finite? agreed? drifted? a streak? → go on, skip or raise, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from distclip.decide.global_norms import GlobalNorms
from distclip.errors import GradientError, NonFiniteError
from distclip.exchange.message import PRESENCE_TOLERANCE
from distclip.records import Culprit
from distclip.setup.options import OnNonfinite
from distclip.values import Flag

WINDOW = 500  # steps: what the clip rate counts, and how long a threshold may always clip


class StepVerdict(Enum):
    """In the order in which they are judged."""

    DISAGREE = "ranks made different calls"
    ERROR = "a rank found something wrong"
    NONFINITE = "inf or NaN"
    PARTIAL_GRADS = "only some holders have a gradient"
    DRIFT = "copies differ"
    FINE = "go on"


_VERDICTS = tuple(StepVerdict)


def _kept_rules(norms: GlobalNorms, tolerance: float | None) -> list[Flag]:
    """Which rules the reduced words keep, in the order of `StepVerdict`: the list for the host and
    for torch's operations on a device (`decide_fixed` in `kernels/step_programs.py` has them once
    more). A NaN keeps no rule.

    Drift and presence are judged on finite steps only: one replica's NaN is a bad step, no drift.
    """
    kept = [
        norms.agreed,
        norms.errors == 0,
        norms.finite,
        abs(norms.presence) <= PRESENCE_TOLERANCE,
    ]
    if tolerance is not None:
        kept.append(abs(norms.drift) <= tolerance * norms.power_sum)
    return kept


def verdict_of(norms: GlobalNorms, tolerance: float | None) -> StepVerdict:
    """The first rule that is broken, from Python's numbers that are equal on every rank."""
    kept = _kept_rules(norms, tolerance)
    return _VERDICTS[kept.index(False)] if False in kept else StepVerdict.FINE


def is_fine(norms: GlobalNorms, tolerance: float | None) -> Flag:
    """Whether no rule is broken: on the device, without a host sync."""
    fine, *others = _kept_rules(norms, tolerance)
    for kept in others:
        fine = fine & kept
    return fine


@dataclass(slots=True)
class SkipStreak:
    """Steps in a row that were not taken."""

    mode: OnNonfinite
    limit: int
    length: int = 0

    def reset(self) -> None:
        self.length = 0

    def count_nonfinite(self, tolerate_backoff: bool) -> bool:
        """Counts a bad step; True if it must end in an error. `tolerate_backoff`: a scaler is
        looking for its scale, `raise` waits for the limit."""
        self.length += 1
        if self.mode == "propagate":
            return False
        return self.length > self.limit or (self.mode == "raise" and not tolerate_backoff)

    def count_spike(self) -> bool:
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
        self, step: int, nonfinite: int, culprits: tuple[Culprit, ...], tolerate_backoff: bool
    ) -> str:
        """Of the first bad step of a streak."""
        then = (
            "The loss scale is lowered; it finds its height by such steps, and further ones are "
            "not told (report.skips counts them)"
            if tolerate_backoff
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
