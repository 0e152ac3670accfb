"""Stage 5: which policy governs which groups, and their answers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distclip.policies.assignment import PolicyAssignment, norms_of
from distclip.policies.state import State
from distclip.records import Clamp, Decision, Norms, Scale, UnitScale


def decide(
    parts: Sequence[PolicyAssignment], norms: Norms, states: State
) -> tuple[Decision, State]:
    """Pure. Every policy answers for its groups; all entries are [groups] float64 on the norms'
    device."""
    rows: list[tuple[Tensor, ...]] = []
    new: list[tuple[Tensor, ...]] = []
    skips: list[Tensor] = []
    clamped, unitwise = frozenset[int](), frozenset[int]()
    for part, state in zip(parts, states, strict=True):
        shown = norms_of(part, norms)
        answer, after = part.policy.decide(shown, state)
        rows.append(_row(answer, shown))
        new.append(after)
        if answer.skip is not None:
            skips.append(answer.skip.any())
        if isinstance(answer, Clamp):
            clamped = clamped.union(part.groups)
        elif isinstance(answer, UnitScale):
            unitwise = unitwise.union(part.groups)
    fields = (
        rows[0]
        if len(parts) == 1
        else [_placed(parts, values, norms.per_group) for values in zip(*rows, strict=True)]
    )
    skip = None if not skips else skips[0] if len(skips) == 1 else torch.stack(skips).any()
    return Decision(*fields, clamped=clamped, unitwise=unitwise, skip=skip), tuple(new)


class StepFlags(NamedTuple):
    """What becomes of a step, on the device. [] bool each."""

    go: Tensor  # finite, and as far as the device judges it nothing else is wrong
    overflow: Tensor  # what a scaler is told; a step that a policy leaves out is no overflow
    skipped: Tensor  # the step is not taken
    clipped: Tensor  # some gradient is scaled or clamped


def fate(
    decision: Decision, finite: Tensor, go: Tensor, passive: bool, propagates: bool
) -> StepFlags:
    """Pure, without a host read.

    Args:
        finite, go: [] bool; `go` implies `finite`.
        passive: nothing is touched; propagates: whatever is wrong, the step is taken unless a
            policy leaves it out.
    """
    if passive:
        nothing = torch.zeros_like(go)
        return StepFlags(go, nothing, nothing, nothing)
    overflow, acts = (torch.zeros_like(go), finite) if propagates else (~go, go)
    if decision.skip is None:
        return StepFlags(go, overflow, overflow, decision.clipped.any() & acts)
    return StepFlags(
        go,
        overflow,
        overflow | (decision.skip & finite),
        decision.clipped.any() & acts & ~decision.skip,
    )


def may_skip(parts: Sequence[PolicyAssignment], norms: Norms, states: State) -> bool:
    """Whether some policy ever leaves a step out, from an answer to any norms."""
    return any(
        part.policy.decide(norms_of(part, norms), s)[0].skip is not None
        for part, s in zip(parts, states, strict=True)
    )


def _row(
    answer: Scale | Clamp | UnitScale, norms: Norms
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One part's coefficients, thresholds, whether it clips, norms afterwards and cosines."""
    one = torch.ones_like(norms.per_group)
    if isinstance(answer, Scale):
        return (
            answer.coef,
            answer.threshold,
            answer.coef.ne(one),
            norms.per_group * answer.coef,
            one,
        )
    if isinstance(answer, Clamp):
        return one, answer.value, answer.clipped, answer.norm_after, answer.cosine
    return one, answer.threshold, answer.clipped, answer.norm_after, one


def _placed(parts: Sequence[PolicyAssignment], values: Sequence[Tensor], like: Tensor) -> Tensor:
    """[groups]: the parts' values side by side."""
    out = torch.empty_like(like, dtype=values[0].dtype)
    for part, value in zip(parts, values, strict=True):
        out.index_copy_(0, part.index, value)
    return out
