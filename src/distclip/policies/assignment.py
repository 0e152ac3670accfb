"""Which policy governs which groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distclip.groups import Exempt, Rule
from distclip.policies.fixed import FixedNorm
from distclip.policies.policy import Policy
from distclip.records import Norms


@dataclass(frozen=True, slots=True)
class PolicyAssignment:
    """The groups of one policy."""

    policy: Policy
    groups: tuple[int, ...]
    stats: slice  # its words among all stats
    # `groups` on the compute device: made once, since making it there waits for the device
    index: Tensor

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


def split(
    groups: Sequence[str], rules: Mapping[str, Rule], main: Policy, device: torch.device
) -> tuple[PolicyAssignment, ...]:
    """One part for each policy object, in the order of its first group."""
    governed: dict[int, tuple[Policy, list[int]]] = {}
    for i, name in enumerate(groups):
        policy = policy_of(rules.get(name), main)
        # numbers and exempt groups make a new object each: a part of their own
        governed.setdefault(id(policy), (policy, []))[1].append(i)
    parts: list[PolicyAssignment] = []
    start = 0
    for policy, indices in governed.values():
        words = len(indices) * _words(policy)
        parts.append(
            PolicyAssignment(
                policy,
                tuple(indices),
                slice(start, start + words),
                torch.tensor(indices, device=device),
            )
        )
        start += words
    return tuple(parts)


def in_total(groups: Sequence[str], rules: Mapping[str, Rule]) -> list[bool]:
    """Which groups count in `total_norm`: all but those exempted from it."""
    return [
        not (isinstance(rule := rules.get(name), Exempt) and not rule.in_total) for name in groups
    ]


def norms_of(part: PolicyAssignment, norms: Norms) -> Norms:
    """What a part's policy is shown."""
    if len(part.groups) == len(norms.per_group):
        return norms
    return Norms(
        norms.per_group[part.index],
        norms.total,
        norms.finite,
        norms.nonfinite,
        norms.stats[part.stats],
        norms.norm_type,
    )
