"""What one call saw and did, as the report that the caller gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distclip.decide.decision import Decision, StepFlags
from distclip.decide.global_norms import GlobalNorms, counted_in_total
from distclip.decide.state import ClipperState
from distclip.groups import Watch
from distclip.p_norm import norm_of_norms
from distclip.records import ClipReport, Culprit
from distclip.setup.plan import Plan
from distclip.values import Column, Number, select, select_column


@dataclass(frozen=True, slots=True)
class ReportMaker:
    """Prepared at set-up.

    Args:
        in_total, in_total_mask: [groups] bool, on the host and on the compute device: which groups
            count in the total; None where all do.
        dtype: of the report's norms.
    """

    plan: Plan
    watch: Watch | None
    in_total: Sequence[bool] | None
    in_total_mask: Tensor | None
    dtype: torch.dtype

    def make(
        self,
        norms: GlobalNorms,
        decision: Decision,
        flags: StepFlags,
        state: ClipperState,
        read_only: bool,
        culprits: tuple[Culprit, ...],
    ) -> ClipReport:
        """Nothing is read on the host; on the CPU no tensor is made before it is read.

        Args:
            state: after the step was recorded in it.
        """
        # gradients stay as they are where the norm is not finite; a skipped step has none
        after = select_column(norms.finite, decision.norms_after, norms.per_group)
        norm_after = self._norm_of_counted(after, norms.norm_type)
        norm_after = select(flags.skipped & norms.finite, 0.0, norm_after)
        coefs = select_column(norms.finite, decision.coef, 1.0)
        coefs = select_column(flags.skipped, 0.0, coefs)
        watch = self.watch
        shown = watch is not None and (read_only or state.num_steps % watch.every == 0)
        none: Any = norms.layers[:0]
        history = state.history
        return ClipReport(
            step=state.step,
            total_norm=self._own(norms.total),
            norm_after=self._own(norm_after),
            clipped=_kept(flags.clipped),
            skipped=_kept(flags.skipped),
            nonfinite=_as_count(norms.nonfinite),
            coefs=self._own(coefs),
            threshold=self._own(decision.threshold),
            group_norms=self._own(norms.per_group),
            cosine=self._own(decision.cosine),
            clip_rate=self._own(history.clip_rate),
            skips=_kept(history.num_skips),
            layer_norms=self._own(norms.layers if shown else none),
            groups=self.plan.groups,
            layers=self.plan.layers if shown else (),
            norm_type=norms.norm_type,
            culprits=culprits,
            dtype=self.dtype,
        )

    def _norm_of_counted(self, column: Column, p: float) -> Number:
        """Over the groups that count in the total, of their norms."""
        counted = counted_in_total(column, self.in_total, self.in_total_mask)
        return counted[0] if len(self.plan.groups) == 1 else norm_of_norms(counted, p)

    def _own(self, value: Any) -> Any:
        """Of the report's dtype, and no tensor that a later step writes to."""
        return value.to(self.dtype, copy=True) if isinstance(value, Tensor) else value


def _kept(value: Any) -> Any:
    """What a later step may write to is copied."""
    return value.clone() if isinstance(value, Tensor) else value


def _as_count(value: Any) -> Any:
    return value.long() if isinstance(value, Tensor) else int(value)
