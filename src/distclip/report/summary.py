"""What one call saw and did, as the report that the caller gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distclip.decide.decision import ClipDecision, StepStatus
from distclip.decide.global_norms import GlobalNorms, counted_in_total
from distclip.decide.state import ClipperState
from distclip.p_norm import norm_of_norms, p_norm, rounded
from distclip.records import ACTIONS, ClipReport
from distclip.setup.plan import Plan
from distclip.values import Number, each, select, select_column

_SKIP = ACTIONS.index("skip")


@dataclass(frozen=True, slots=True)
class ReportMaker:
    """Prepared at set-up.

    Args:
        in_total, in_total_mask: [groups] bool, on the host and on the compute device: which groups
            count in the total; None where all do.
        bits: how many a norm keeps.
        dtype: of the report's norms; device: of all of its tensors.
    """

    plan: Plan
    in_total: Sequence[bool] | None
    in_total_mask: Tensor | None
    bits: int
    dtype: torch.dtype
    device: torch.device

    def make(
        self,
        norms: GlobalNorms,
        decision: ClipDecision,
        status: StepStatus,
        state: ClipperState,
        read_only: bool,
        capturing: bool,
    ) -> ClipReport:
        """Nothing is read on the host; nothing is worked out before it is read, but inside a
        captured graph, whose replays write to the report's tensors.

        Args:
            state: after the step was recorded in it.
        """
        rate, skips = state.history.take_latest()
        action = None if read_only else decision.action
        on_host = not isinstance(rate, Tensor)
        numbers = partial(self._numbers, norms, decision, status, rate, skips, action)
        fields: dict[str, Any] = {
            "step": state.step,
            "groups": self.plan.groups,
            "layers": self.plan.layers,
            "norm_type": norms.norm_type,
            "culprits": status.culprits,
            "matters": status.matters,
            "deviation": status.deviation,
            "notes": status.notes,
            "ended_in": status.ended_in,
            "dtype": self.dtype,
        }
        if capturing:
            return ClipReport(**numbers(), **fields)
        if on_host:  # what is read most often is there without the rest
            fields["total_norm"], fields["skipped"] = norms.total, status.skipped
        return ClipReport.deferred(numbers, fields, self.device if on_host else None)

    def _numbers(
        self,
        norms: GlobalNorms,
        decision: ClipDecision,
        status: StepStatus,
        clip_rate: Number,
        num_skips: Number,
        action: Number | None,
    ) -> dict[str, Any]:
        """The fields that are tensors; as Python's numbers where they are that."""
        # gradients stay as they are where the norm is not finite; a skipped step has none
        after = select_column(norms.finite, decision.norms_after, norms.per_group)
        counted = counted_in_total(after, self.in_total, self.in_total_mask)
        norm_after = counted[0] if len(counted) == 1 else norm_of_norms(counted, norms.norm_type)
        coefs = select_column(norms.finite, decision.coef, 1.0)
        own = {
            "total_norm": norms.total,
            "norm_after": select(status.skipped & norms.finite, 0.0, norm_after),
            "coefs": select_column(status.skipped, 0.0, coefs),
            "threshold": decision.threshold,
            "group_norms": norms.per_group,
            "cosine": decision.cosine,
            "clip_rate": clip_rate,
            "layer_norms": self._layer_norms(norms),
            "rank_norms": norms.rank_norms,
        }
        # 0 there, without sending one: nonfinite is a count
        none = norms.nonfinite * 0
        rung = none
        if action is not None:
            # with "propagate" a step that is not finite is taken, whatever a policy says
            rung = select(status.skipped | (action != _SKIP), action, none)
        counts = {"nonfinite": norms.nonfinite, "skips": num_skips, "rung": rung}
        flag = {"clipped": status.clipped, "skipped": status.skipped}
        return {
            **{name: _as(value, self.dtype) for name, value in own.items()},
            **{name: _as(value, torch.int64) for name, value in counts.items()},
            **{name: _as(value, torch.bool) for name, value in flag.items()},
        }

    def _layer_norms(self, norms: GlobalNorms) -> Any:
        """There may be many: on the host a function, for where they are read."""
        norm, sums = p_norm(norms.norm_type), norms.layer_sums
        layers = partial(each, lambda power_sum: rounded(norm.finish(power_sum), self.bits), sums)
        return layers() if isinstance(sums, Tensor) else layers


def _as(value: Any, dtype: torch.dtype) -> Any:
    """A tensor of that dtype that no later step writes to."""
    return value.to(dtype, copy=True) if isinstance(value, Tensor) else value
