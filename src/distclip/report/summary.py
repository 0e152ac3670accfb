"""Stage 8a: what one call saw and did, as the report that the caller gets."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distclip.decide.decision import StepFlags
from distclip.groups import Watch
from distclip.measure.local_sums import GlobalNorms
from distclip.p_norm import norm_of
from distclip.records import ClipReport, Culprit, Decision, Norms
from distclip.setup.plan import Plan


@dataclass(frozen=True, slots=True)
class Summary:
    """Prepared at set-up."""

    plan: Plan
    watch: Watch | None
    in_total: Tensor | None  # [groups] bool: which groups count in the total; None where all do
    none: Tensor  # [0], of the report's dtype

    def of(
        self,
        step: int,
        reduced: GlobalNorms,
        decision: Decision,
        fate: StepFlags,
        rate: Tensor,
        skips: Tensor,
        culprits: tuple[Culprit, ...],
        taken: int,
        passive: bool,
        fine: bool,
    ) -> ClipReport:
        """All on the device.

        Args:
            rate: [] float64, and skips, [] int64: of the history.
            taken: calls so far that were not passive; passive: this one touches nothing.
            fine: the host knows already that the step is finite and taken.
        """
        norms, dtype, coefs = reduced.norms, self.none.dtype, decision.coef
        after = self._after(
            norms,
            decision.norms_after
            if fine
            else torch.where(norms.finite, decision.norms_after, norms.per_group),
        )
        if not fine:
            coefs = torch.where(fate.skipped, 0.0, torch.where(norms.finite, coefs, 1.0))
            after = torch.where(fate.skipped & norms.finite, 0.0, after)
        shown = self.watch is not None and (passive or taken % self.watch.every == 0)
        total, after, rate = torch.stack([norms.total, after, rate]).to(dtype).unbind()
        coefs, threshold, before, cosine = (
            torch.stack([coefs, decision.threshold, norms.per_group, decision.cosine])
            .to(dtype)
            .unbind()
        )
        return ClipReport(
            step=step,
            total_norm=total,
            norm_after=after,
            clipped=fate.clipped,
            skipped=fate.skipped,
            nonfinite=norms.nonfinite,
            coefs=coefs,
            threshold=threshold,
            group_norms=before,
            cosine=cosine,
            clip_rate=rate,
            skips=skips,
            layer_norms=reduced.layers.to(dtype) if shown else self.none,
            groups=self.plan.groups,
            layers=self.plan.layers if shown else (),
            norm_type=norms.norm_type,
            culprits=culprits,
        )

    def _after(self, norms: Norms, each: Tensor) -> Tensor:
        """[] float64: from `each` [groups], the norm over the groups that count in the total."""
        p, after = (
            norms.norm_type,
            each if self.in_total is None else torch.where(self.in_total, each, 0.0),
        )
        if len(self.plan.groups) == 1:
            return after[0]
        return after.amax() if math.isinf(p) else norm_of(after.pow(p).sum(), p)
