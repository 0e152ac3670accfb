"""The policies' answers side by side, and what becomes of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distclip.decide.global_norms import GlobalNorms
from distclip.policies.assignment import PolicyAssignment
from distclip.policies.fixed import clip_coefficient
from distclip.policies.state import State, clone_state
from distclip.records import Clamp, Culprit, Norms, Note, Scale, UnitScale
from distclip.values import (
    Column,
    Flag,
    FlagColumn,
    Number,
    any_of,
    as_column,
    fill,
    multiply,
    select,
)


class ClipDecision(NamedTuple):
    """What happens to the gradients, one entry a group: of all groups, or at first of one
    policy's."""

    coef: Column  # 1 where the group is clamped or scaled by units
    threshold: Column
    clipped: FlagColumn
    norms_after: Column
    cosine: Column  # between raw and clipped gradient; 1 where the direction is kept
    clamped: frozenset[int]  # groups whose elements are clamped to the threshold
    unitwise: frozenset[int]  # groups that are scaled by units
    skip: Flag | None  # a policy leaves this step out; None where no policy answered so
    # what the loop should do, by its place in ACTIONS; None where no policy says it
    action: Number | None = None


_COLUMNS = ("coef", "threshold", "clipped", "norms_after", "cosine")  # entries of groups
_NO_GROUPS: frozenset[int] = frozenset()


def decide(
    assignments: Sequence[PolicyAssignment], norms: GlobalNorms, states: State
) -> tuple[ClipDecision, State]:
    """Pure: equal norms and states on all ranks give equal decisions. No host sync on a device."""
    decisions: list[ClipDecision] = []
    next_states: list[tuple[Tensor, ...]] = []
    for assignment, state in zip(assignments, states, strict=True):
        own = norms.per_group if assignment.has_all else assignment.select_groups(norms.per_group)
        if assignment.constant is not None and not isinstance(own, Tensor):
            decisions.append(_by_constant(own, assignment.constant))
            next_states.append(state)
            continue
        shown = norms.shown_to(assignment)
        # a copy: an answer may hold on to its state, which is written to before it is put to use
        answer, next_state = assignment.policy.decide(shown, clone_state(state) if state else state)
        decisions.append(_by_answer(answer, shown, assignment.groups, norms))
        next_states.append(next_state)
    decision = decisions[0] if len(decisions) == 1 else _side_by_side(assignments, decisions, norms)
    return decision, tuple(next_states)


def _by_constant(norms: list[float], threshold: float) -> ClipDecision:
    """A fixed threshold's, in Python's numbers."""
    coefs: list[float] = []
    after: list[float] = []
    clipped: list[bool] = []
    for norm in norms:
        coef = clip_coefficient(norm, threshold)
        coefs.append(coef)
        after.append(norm * coef)
        clipped.append(coef != 1)
    thresholds, ones = [threshold] * len(norms), [1.0] * len(norms)
    return ClipDecision(
        coef=coefs,
        threshold=thresholds,
        clipped=clipped,
        norms_after=after,
        cosine=ones,
        clamped=_NO_GROUPS,
        unitwise=_NO_GROUPS,
        skip=None,
    )


def _by_answer(
    answer: Scale | Clamp | UnitScale, shown: Norms, groups: tuple[int, ...], norms: GlobalNorms
) -> ClipDecision:
    """One policy's, of the norms that it was shown."""
    one = torch.ones_like(shown.per_group)
    if isinstance(answer, Scale):
        after = shown.per_group * answer.coef
        columns = answer.coef, answer.threshold, answer.coef.ne(one), after, one
    elif isinstance(answer, Clamp):
        columns = one, answer.value, answer.clipped, answer.norm_after, answer.cosine
    else:
        columns = one, answer.threshold, answer.clipped, answer.norm_after, one
    on_host = not isinstance(norms.per_group, Tensor)
    skip: Flag | None = None if answer.skip is None else answer.skip.any()
    action: Number | None = answer.action
    if not isinstance(norms.finite, Tensor):  # many groups stand in a tensor on the host too
        skip = None if skip is None else bool(skip)
        action = None if action is None else int(action)
    return ClipDecision(
        **{name: as_column(column, on_host) for name, column in zip(_COLUMNS, columns)},
        clamped=frozenset(groups) if isinstance(answer, Clamp) else _NO_GROUPS,
        unitwise=frozenset(groups) if isinstance(answer, UnitScale) else _NO_GROUPS,
        skip=skip,
        action=action,
    )


def _side_by_side(
    assignments: Sequence[PolicyAssignment], decisions: Sequence[ClipDecision], norms: GlobalNorms
) -> ClipDecision:
    """Of all groups: each policy's entries at its groups' places."""
    columns: dict[str, Any] = {}
    for name in _COLUMNS:
        values = [getattr(decision, name) for decision in decisions]
        if isinstance(norms.per_group, Tensor):
            out = torch.empty_like(norms.per_group, dtype=values[0].dtype)
            for assignment, value in zip(assignments, values, strict=True):
                out.index_copy_(0, assignment.index, value)
        else:
            placed = {
                group: entry
                for assignment, value in zip(assignments, values, strict=True)
                for group, entry in zip(assignment.groups, value, strict=True)
            }
            out = [placed[group] for group in range(len(norms.per_group))]
        columns[name] = out
    skips = [decision.skip for decision in decisions if decision.skip is not None]
    actions = [decision.action for decision in decisions if decision.action is not None]
    return ClipDecision(
        **columns,
        clamped=_NO_GROUPS.union(*(decision.clamped for decision in decisions)),
        unitwise=_NO_GROUPS.union(*(decision.unitwise for decision in decisions)),
        skip=_any_flag(skips) if skips else None,
        action=_highest(actions) if actions else None,
    )


def _highest(actions: Sequence[Number]) -> Number:
    """Where several policies say what to do."""
    first, *others = actions
    for action in others:
        first = select(action > first, action, first)
    return first


def _any_flag(flags: Sequence[Flag]) -> Flag:
    first, *others = flags
    for flag in others:
        first = first | flag
    return first


def no_decision(norms: GlobalNorms) -> ClipDecision:
    """For norms of parameters, of which nothing is clipped."""
    one = fill(norms.per_group, 1.0)
    nothing: Any = one.ne(one) if isinstance(one, Tensor) else [False] * len(one)
    return ClipDecision(
        coef=one,
        threshold=multiply(one, float("inf")),
        clipped=nothing,
        norms_after=norms.per_group,
        cosine=one,
        clamped=_NO_GROUPS,
        unitwise=_NO_GROUPS,
        skip=None,
    )


@dataclass(slots=True)
class StepStatus:
    """What becomes of a step, and what was found of it, which `StepChecker` fills in."""

    ok: Flag  # finite, and nothing else is wrong
    found_inf: Flag  # what a scaler is told; a step that a policy leaves out is no overflow
    skipped: Flag  # the step is not taken
    clipped: Flag  # some gradient is scaled or clamped
    judged: bool = False  # what follows is known, as a `ClipReport` has it
    matters: str | None = None
    deviation: float | None = None
    culprits: tuple[Culprit, ...] = ()
    notes: tuple[Note, ...] = ()
    ended_in: str | None = None

    @property
    def taken(self) -> Flag:
        """Policies learn from this step."""
        return self.ok & (self.skipped ^ True)

    def with_flags_of(self, other: StepStatus) -> StepStatus:
        """What was found here, beside another's flags."""
        ok, found_inf, skipped, clipped = other.ok, other.found_inf, other.skipped, other.clipped
        return replace(self, ok=ok, found_inf=found_inf, skipped=skipped, clipped=clipped)


def resolve(
    decision: ClipDecision, finite: Flag, ok: Flag, read_only: bool, propagates: bool
) -> StepStatus:
    """Pure. Not judged yet.

    Args:
        ok: finite, and nothing else is wrong.
        read_only: nothing is touched.
        propagates: whatever is wrong, the step is taken unless a policy leaves it out.
    """
    if read_only:
        nothing = ok & False
        return StepStatus(ok, nothing, nothing, nothing)
    found_inf, acts = (finite & False, finite) if propagates else (ok ^ True, ok)
    some_clipped = any_of(decision.clipped)
    if not isinstance(acts, Tensor):  # many groups stand in a tensor on the host too
        some_clipped = bool(some_clipped)
    clipped = some_clipped & acts
    if decision.skip is None:
        return StepStatus(ok, found_inf, found_inf, clipped)
    skipped = found_inf | (decision.skip & finite)
    return StepStatus(ok, found_inf, skipped, clipped & (decision.skip ^ True))


def ended(status: StepStatus) -> StepStatus:
    """Of a step that ends in an error: whatever its norm, it is not taken."""
    nothing = status.ok & False
    return replace(status, ok=nothing, skipped=nothing ^ True, clipped=nothing)


def ever_skips(assignments: Sequence[PolicyAssignment], norms: GlobalNorms, states: State) -> bool:
    """Whether some policy leaves steps out, from an answer to any norms."""
    return decide(assignments, norms, states)[0].skip is not None
