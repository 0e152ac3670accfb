"""Which policy governs which groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distclip.groups import Exempt, Rule
from distclip.passed import as_number
from distclip.policies.fixed import FixedNorm
from distclip.policies.policy import Policy, describe, is_policy
from distclip.values import Column


@dataclass(frozen=True, slots=True)
class PolicyAssignment:
    """The groups of one policy."""

    policy: Policy
    groups: tuple[int, ...]
    has_all: bool  # these are all groups
    stats: slice  # its words among all stats
    # `groups` on the compute device: made once, since making it there waits for the device
    index: Tensor
    constant: float | None  # the threshold, where it is always the same

    @property
    def num_stats(self) -> int:
        """Words of the message for each group."""
        return num_stats_of(self.policy)

    def select_groups(self, column: Column) -> Column:
        """Of a column over all groups, the entries of this policy's."""
        if isinstance(column, Tensor):
            return column[self.index]
        return [column[group] for group in self.groups]


def num_stats_of(policy: Policy) -> int:
    """Words of the message that a policy asks for, for each of its groups."""
    return int(getattr(policy, "num_stats", 0))


def policy_of(rule: Rule, main: Policy) -> Policy:
    """A rule of `groups=` as a policy: a number is a FixedNorm, an exempt group is only measured.

    Raises:
        ConfigError: a number that is no threshold.
    """
    if isinstance(rule, Exempt):
        return FixedNorm(math.inf)
    if rule is None:
        return main
    given: Any = rule
    return given if is_policy(given) else FixedNorm(as_number(given))


def assign_policies(
    groups: Sequence[str], rules: Mapping[str, Rule], main: Policy, device: torch.device
) -> tuple[PolicyAssignment, ...]:
    """One assignment for each policy object, in the order of its first group."""
    governed: dict[int, tuple[Policy, list[int]]] = {}
    for i, name in enumerate(groups):
        policy = policy_of(rules.get(name), main)
        # numbers and exempt groups make a new object each: an assignment of their own
        governed.setdefault(id(policy), (policy, []))[1].append(i)
    assignments: list[PolicyAssignment] = []
    start = 0
    for policy, indices in governed.values():
        end = start + len(indices) * num_stats_of(policy)
        assignments.append(
            PolicyAssignment(
                policy=policy,
                groups=tuple(indices),
                has_all=len(indices) == len(groups),
                stats=slice(start, end),
                index=torch.tensor(indices, device=device),
                constant=policy.max_norm if type(policy) is FixedNorm else None,
            )
        )
        start = end
    return tuple(assignments)


def groups_in_total(groups: Sequence[str], rules: Mapping[str, Rule]) -> list[bool]:
    """Which groups count in `total_norm`: all but those exempted from it."""
    return [
        not (isinstance(rule := rules.get(name), Exempt) and not rule.in_total) for name in groups
    ]


def describe_rules(rules: Mapping[str, Any]) -> str:
    """A text that is equal on all ranks for equal rules."""
    return ", ".join(
        f"{name}: {rule if isinstance(rule, (int, float, Exempt)) else describe(rule)}"
        for name, rule in rules.items()
    )


def describe_assignments(assignments: Sequence[PolicyAssignment], groups: Sequence[str]) -> str:
    """A line for each policy, with the names of its groups."""
    return "\n".join(
        f"{describe(each.policy)}: {', '.join(groups[group] for group in each.groups)}"
        for each in assignments
    )
