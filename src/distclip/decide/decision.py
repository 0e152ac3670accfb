"""Stage 5: which policy governs which groups, and their answers side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distclip.groups import Exempt, Rule
from distclip.policies.fixed import FixedNorm
from distclip.policies.policy import Policy
from distclip.records import Clamp, Decision, Norms, Scale, UnitScale

State = tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """The groups of one policy."""

    policy: Policy
    groups: tuple[int, ...]
    stats: slice  # its words among all stats
    index: Tensor  # `groups` on the compute device: made once, since making it there waits for the device

    @property
    def words(self) -> int:
        return _words(self.policy)


def _words(policy: Policy) -> int:
    return int(getattr(policy, "words", 0))


def policy_of(rule: Rule, main: Policy) -> Policy:
    """A rule of `groups=` as a policy: a number is a FixedNorm, an exempt group is only measured.

    Raises:
        ConfigError: a number that is no threshold.
    """
    if isinstance(rule, Exempt):
        return FixedNorm(math.inf)
    if isinstance(rule, (int, float)):
        return FixedNorm(float(rule))
    return main if rule is None else rule


def split(groups: Sequence[str], rules: Mapping[str, Rule], main: Policy, device: torch.device) -> tuple[Part, ...]:
    """One part for each policy object, in the order of its first group."""
    governed: dict[int, tuple[Policy, list[int]]] = {}
    for i, name in enumerate(groups):
        policy = policy_of(rules.get(name), main)
        # numbers and exempt groups make a new object each: a part of their own
        governed.setdefault(id(policy), (policy, []))[1].append(i)
    parts: list[Part] = []
    start = 0
    for policy, indices in governed.values():
        words = len(indices) * _words(policy)
        parts.append(Part(policy, tuple(indices), slice(start, start + words), torch.tensor(indices, device=device)))
        start += words
    return tuple(parts)


def in_total(groups: Sequence[str], rules: Mapping[str, Rule]) -> list[bool]:
    """Which groups count in `total_norm`: all but those exempted from it."""
    return [not (isinstance(rule := rules.get(name), Exempt) and not rule.in_total) for name in groups]


def decide(parts: Sequence[Part], norms: Norms, states: State) -> tuple[Decision, State]:
    """Pure. Every policy answers for its groups; all entries are [groups] float64 on the norms' device."""
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
    fields = rows[0] if len(parts) == 1 else [_placed(parts, values, norms.per_group) for values in zip(*rows, strict=True)]
    skip = None if not skips else skips[0] if len(skips) == 1 else torch.stack(skips).any()
    return Decision(*fields, clamped=clamped, unitwise=unitwise, skip=skip), tuple(new)


class Fate(NamedTuple):
    """What becomes of a step, on the device. [] bool each."""

    go: Tensor  # finite, and as far as the device judges it nothing else is wrong
    overflow: Tensor  # what a scaler is told; a step that a policy leaves out is no overflow
    skipped: Tensor  # the step is not taken
    clipped: Tensor  # some gradient is scaled or clamped


def fate(decision: Decision, finite: Tensor, go: Tensor, passive: bool, propagates: bool) -> Fate:
    """Pure, without a host read.

    Args:
        finite, go: [] bool; `go` implies `finite`.
        passive: nothing is touched; propagates: whatever is wrong, the step is taken unless a policy leaves it out.
    """
    if passive:
        nothing = torch.zeros_like(go)
        return Fate(go, nothing, nothing, nothing)
    overflow, acts = (torch.zeros_like(go), finite) if propagates else (~go, go)
    if decision.skip is None:
        return Fate(go, overflow, overflow, decision.clipped.any() & acts)
    return Fate(go, overflow, overflow | (decision.skip & finite), decision.clipped.any() & acts & ~decision.skip)


def may_skip(parts: Sequence[Part], norms: Norms, states: State) -> bool:
    """Whether some policy ever leaves a step out, from an answer to any norms."""
    return any(part.policy.decide(norms_of(part, norms), s)[0].skip is not None for part, s in zip(parts, states, strict=True))


def norms_of(part: Part, norms: Norms) -> Norms:
    """What a part's policy is shown."""
    if len(part.groups) == len(norms.per_group):
        return norms
    return Norms(norms.per_group[part.index], norms.total, norms.finite, norms.nonfinite, norms.stats[part.stats], norms.norm_type)


def _row(answer: Scale | Clamp | UnitScale, norms: Norms) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One part's coefficients, thresholds, whether it clips, norms afterwards and cosines."""
    one = torch.ones_like(norms.per_group)
    if isinstance(answer, Scale):
        return answer.coef, answer.threshold, answer.coef.ne(one), norms.per_group * answer.coef, one
    if isinstance(answer, Clamp):
        return one, answer.value, answer.clipped, answer.norm_after, answer.cosine
    return one, answer.threshold, answer.clipped, answer.norm_after, one


def _placed(parts: Sequence[Part], values: Sequence[Tensor], like: Tensor) -> Tensor:
    """[groups]: the parts' values side by side."""
    out = torch.empty_like(like, dtype=values[0].dtype)
    for part, value in zip(parts, values, strict=True):
        out.index_copy_(0, part.index, value)
    return out


def kept(old: State, new: State, finite: Tensor) -> State:
    """The new state where the step was finite, else the old one: selected, never multiplied."""
    return tuple(
        _like(before, (torch.where(finite, n, o) for o, n in zip(before, now, strict=True))) for before, now in zip(old, new, strict=True)
    )


def copied(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Clones, in a named tuple of the same kind where it is one."""
    return _like(state, (t.clone() for t in state))


def moved(states: State, device: torch.device) -> State:
    """The same on another device."""
    return tuple(_like(state, (t.to(device) for t in state)) for state in states)


def _like(state: tuple[Tensor, ...], values: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return getattr(state, "_make", tuple)(values)


def describe_rules(rules: Mapping[str, Any], describe: Any) -> str:
    return ", ".join(f"{name}: {rule if isinstance(rule, (int, float, Exempt)) else describe(rule)}" for name, rule in rules.items())
