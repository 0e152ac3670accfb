"""Stage 5: which policy governs which groups, and their answers side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distclip.groups import Exempt, Rule
from distclip.policies.fixed import FixedNorm
from distclip.policies.policy import LocalStats, Policy
from distclip.records import Decision, Norms, Scale

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
        return self.policy.words if isinstance(self.policy, LocalStats) else 0


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
        words = len(indices) * (policy.words if isinstance(policy, LocalStats) else 0)
        parts.append(Part(policy, tuple(indices), slice(start, start + words), torch.tensor(indices, device=device)))
        start += words
    return tuple(parts)


def in_total(groups: Sequence[str], rules: Mapping[str, Rule]) -> list[bool]:
    """Which groups count in `total_norm`: all but those exempted from it."""
    return [not (isinstance(rule := rules.get(name), Exempt) and not rule.in_total) for name in groups]


def decide(parts: Sequence[Part], norms: Norms, states: State) -> tuple[Decision, State]:
    """Pure. Every policy answers for its groups; all entries are [groups] float64 on the norms' device."""
    coef, threshold = torch.ones_like(norms.per_group), torch.full_like(norms.per_group, math.inf)
    clipped = torch.zeros_like(norms.per_group, dtype=torch.bool)
    after = norms.per_group.clone()
    out: list[tuple[Tensor, ...]] = []
    clamped: set[int] = set()
    skip = torch.zeros((), dtype=torch.bool, device=coef.device)
    for part, state in zip(parts, states, strict=True):
        at = part.index
        own = Norms(norms.per_group[at], norms.total, norms.finite, norms.nonfinite, norms.stats[part.stats], norms.norm_type)
        answer, new = part.policy.decide(own, state)
        out.append(new)
        if answer.skip is not None:
            skip = skip | answer.skip.any()
        if isinstance(answer, Scale):
            coef[at], threshold[at] = answer.coef, answer.threshold
            clipped[at] = answer.coef != 1
            after[at] = own.per_group * answer.coef
        else:
            threshold[at], clipped[at], after[at] = answer.value, answer.clipped, answer.norm_after
            clamped |= set(part.groups)
    return Decision(coef, threshold, clipped, after, frozenset(clamped), skip), tuple(out)


def kept(old: State, new: State, finite: Tensor) -> State:
    """The new state where the step was finite, else the old one: selected, never multiplied."""
    return tuple(tuple(torch.where(finite, n, o) for o, n in zip(before, now, strict=True)) for before, now in zip(old, new, strict=True))


def describe_rules(rules: Mapping[str, Any], describe: Any) -> str:
    return ", ".join(f"{name}: {rule if isinstance(rule, (int, float, Exempt)) else describe(rule)}" for name, rule in rules.items())
