"""Stage 8a: what one call saw and did, as the report that the caller gets."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distclip.groups import Watch
from distclip.measure import norm_of
from distclip.plan import Plan
from distclip.records import ClipReport, Culprit, Decision
from distclip.sensing import Reduced


@dataclass(frozen=True, slots=True)
class Summary:
    """Prepared at set-up."""

    plan: Plan
    watch: Watch | None
    in_total: Tensor  # [groups] bool
    dtype: torch.dtype  # of the report's numbers

    def of(
        self,
        step: int,
        reduced: Reduced,
        decision: Decision,
        rate: Tensor,
        skips: Tensor,
        skipped: Tensor,
        clipped: Tensor,
        culprits: tuple[Culprit, ...],
        taken: int,
        passive: bool,
    ) -> ClipReport:
        """All on the device.

        Args:
            rate: [] float64, and skips, [] int64: of the history.
            skipped: [] bool: the step is not taken.
            clipped: [] bool: some gradient is scaled or clamped.
            taken: calls so far that were not passive; passive: this one touches nothing.
        """
        norms, dtype = reduced.norms, self.dtype
        coefs = torch.where(skipped, 0.0, torch.where(norms.finite, decision.coef, 1.0))
        shown = self.watch is not None and (passive or taken % self.watch.every == 0)
        return ClipReport(
            step=step,
            total_norm=norms.total.to(dtype),
            norm_after=torch.where(skipped & norms.finite, 0.0, self._after(reduced, decision)).to(dtype),
            clipped=clipped,
            skipped=skipped,
            nonfinite=norms.nonfinite,
            coefs=coefs.to(dtype),
            threshold=decision.threshold.to(dtype),
            group_norms=norms.per_group.to(dtype),
            cosine=decision.cosine.to(dtype),
            clip_rate=rate.to(dtype),
            skips=skips,
            layer_norms=reduced.layers.to(dtype) if shown else torch.zeros(0, dtype=dtype, device=norms.total.device),
            groups=self.plan.groups,
            layers=self.plan.layers if shown else (),
            norm_type=norms.norm_type,
            culprits=culprits,
        )

    def _after(self, reduced: Reduced, decision: Decision) -> Tensor:
        """[] float64: the norm over the groups that count in the total."""
        norms, p = reduced.norms, reduced.norms.norm_type
        after = torch.where(self.in_total, torch.where(norms.finite, decision.norms_after, norms.per_group), 0.0)
        if len(self.plan.groups) == 1:
            return after[0]
        return after.amax() if math.isinf(p) else norm_of(after.pow(p).sum(), p)
