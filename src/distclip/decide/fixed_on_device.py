"""The decision by constant thresholds where the host does not read: one launch does what
`read_norms`, `decide`, `is_fine` and `resolve` do, and packs what the host will read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distclip.decide.decision import ClipDecision, StepStatus
from distclip.decide.global_norms import GlobalNorms
from distclip.exchange.message import CHECK_WORDS, PRESENCE_TOLERANCE, MessageLayout
from distclip.kernels import kernels_for
from distclip.kernels.step_kernels import FixedDecider, FixedStep
from distclip.p_norm import rounding_of
from distclip.policies.assignment import PolicyAssignment


@dataclass(frozen=True, slots=True)
class FixedOnDevice:
    """Made by `fixed_on_device`."""

    layout: MessageLayout
    decider: FixedDecider
    ones: Tensor  # [groups] float64

    def decide(
        self,
        message: Tensor,
        inv_scale: Tensor | None,
        clip_rate: Tensor,
        read_only: bool,
        late: bool,
    ) -> tuple[GlobalNorms, ClipDecision, FixedStep]:
        """Of a reduced message. No host sync.

        Args:
            late: the step is judged at the next call: the device leaves it out whatever is wrong.

        Returns:
            With the norms and the decision all that the kernel has worked out, `status_of` it and
            what the host reads among that.
        """
        layout = self.layout
        step = self.decider.decide(message, clip_rate, inv_scale, read_only, late)
        agreed, finite = step.flags[:2]
        norms = GlobalNorms(
            **dict(zip(CHECK_WORDS, step.words, strict=True)),
            agreed=agreed,
            finite=finite,
            per_group=step.norms,
            total=step.total,
            stats=message[layout.stats],
            layer_sums=message[layout.layers],
            split_unit_coefs=None,
            norm_type=layout.norm_type,
            rank_norms=message[layout.rank_norms],
        )
        decision = ClipDecision(
            coef=step.coefs,
            threshold=self.decider.thresholds,
            clipped=step.clipped,
            norms_after=step.norms_after,
            cosine=self.ones,
            clamped=frozenset(),
            unitwise=frozenset(),
            skip=None,
        )
        return norms, decision, step


def status_of(step: FixedStep) -> StepStatus:
    """What becomes of the step."""
    _, _, ok, found_inf, skipped, clipped = step.flags
    return StepStatus(ok, found_inf, skipped, clipped)


def fixed_on_device(
    layout: MessageLayout,
    assignments: Sequence[PolicyAssignment],
    in_total: Tensor | None,
    bits: int,
    drift_tolerance: float | None,
    propagates: bool,
) -> FixedOnDevice | None:
    """None where the kernel is not there, some threshold is no constant, or the norm is of another
    order than 1, 2 or inf.

    Args:
        in_total: [groups] bool on the compute device; None where all count in the total.
        bits: how many a norm keeps.
    """
    device = layout.share.device
    constants = {group: each.constant for each in assignments for group in each.groups}
    has_kernel = not layout.on_host and kernels_for((torch.float64,), device) == "triton"
    if not has_kernel or None in constants.values() or layout.norm_type not in (1, 2, math.inf):
        return None
    numbers = [constants[group] for group in range(layout.num_groups)]
    thresholds = torch.tensor(numbers, dtype=torch.float64, device=device)
    decider = FixedDecider(
        thresholds=thresholds,
        in_total=in_total,
        num_layers=layout.num_layers,
        num_rank_norms=layout.num_rank_norms,
        num_ranks=layout.num_ranks,
        is_max=layout.norm.is_max,
        is_square=layout.norm_type == 2,
        rounding=rounding_of(bits),
        propagates=propagates,
        drift_tolerance=drift_tolerance,
        presence_tolerance=PRESENCE_TOLERANCE,
        num_words=layout.num_words,
    )
    return FixedOnDevice(layout, decider, torch.ones_like(thresholds))
