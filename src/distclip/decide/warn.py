"""What is allowed and seldom meant: said once each, at the user's own line."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence

from distclip.decide.guard import WINDOW
from distclip.policies.assignment import PolicyAssignment
from distclip.policies.policy import shown

ALWAYS_CLIPPED = 0.95  # of the last WINDOW steps: a threshold that sets the length of steps
BENT_COSINE = 0.9  # below which value clipping changes the direction


class StepWarnings:
    """RuntimeWarnings of one clipper.

    Args:
        assignments: policies and their groups.
        has_sinks: the first rank has sinks, which report each step.
    """

    def __init__(self, assignments: Sequence[PolicyAssignment], has_sinks: bool) -> None:
        self.has_sinks = has_sinks
        policies = (assignment.policy for assignment in assignments)
        # a threshold of the user's own: one that nearly always clips may be a mistake
        chosen = (policy for policy in policies if getattr(policy, "user_threshold", False))
        self._threshold_policy = next(chosen, None)
        self._given: set[str] = set()

    def warn(self, text: str) -> None:
        warnings.warn(text, RuntimeWarning, stacklevel=user_stacklevel())

    def warn_once(self, kind: str, text: str, all_alike: bool = True) -> None:
        """`all_alike`: all ranks are told the same."""
        if kind not in self._given:
            self._given.add(kind)
            (self.warn if all_alike else warn_or_log)(text)

    def was_given(self, kind: str) -> bool:
        return kind in self._given

    def warn_untrained(self, num_params: int) -> None:
        """At set-up, where no rank has anything to train. `num_params`: over all ranks."""
        count = f"{num_params:,} parameter{'' if num_params == 1 else 's'}"
        self.warn(
            f"GradClipper: of its {count} none is trainable on any rank (requires_grad is False), "
            "so there is nothing to clip. If that is a mistake, unfreeze what is to be trained; if "
            "it will be unfrozen later there is nothing to do, it is clipped from then on"
        )

    def check_habits(self, clip_rate: float, num_steps: int, cosine: float) -> None:
        """Of a step that is finite.

        Args:
            clip_rate: share of the last steps that were clipped; num_steps: that it counts.
            cosine: the least one, between raw and clamped gradients.
        """
        policy = self._threshold_policy
        if policy is not None and num_steps >= WINDOW and clip_rate > ALWAYS_CLIPPED:
            self.warn_once(
                "always",
                f"{100 * clip_rate:.0f} % of the last {WINDOW} steps were clipped by "
                f"{shown(policy)}: a threshold below nearly every "
                "norm does not catch outliers but sets the length of every step, like a smaller "
                "learning rate, and may starve learning. "
                "Raise it (`distclip suggest RUN.jsonl` shows what others would do), or use "
                "distclip.Normalize if that is meant",
            )
        if cosine < BENT_COSINE:
            self.warn_once(
                "bent",
                f"value clipping turned the gradient: its cosine with the raw one is {cosine:.2f}. "
                "Raise clip_value, or clip the norm (max_norm=...), which keeps the direction",
            )


def warn_or_log(text: str) -> None:
    """A warning; in the log where warnings are errors, since one on this rank alone would leave the
    others waiting."""
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=user_stacklevel())
    except RuntimeWarning:
        logging.getLogger("distclip").warning(text)


def user_stacklevel() -> int:
    """The stack level, seen from the caller, of the first frame that is neither distclip's nor
    torch's: the user's line."""
    frame, level = sys._getframe(1), 1
    own = ("distclip", "torch")
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] in own:
        frame, level = frame.f_back, level + 1
    return level
