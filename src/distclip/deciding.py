"""Stage 5: which policy governs which groups, and their answers side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    answers = [part.policy.decide(norms_of(part, norms), state) for part, state in zip(parts, states, strict=True)]
    new = tuple(state for _, state in answers)
    rows = [_row(answer, norms_of(part, norms)) for part, (answer, _) in zip(parts, answers, strict=True)]
    skips = [answer.skip.any() for answer, _ in answers if answer.skip is not None]
    return Decision(
        *(_placed(parts, [row[i] for row in rows], norms.per_group) for i in range(5)),
        clamped=frozenset(g for part, (answer, _) in zip(parts, answers, strict=True) if isinstance(answer, Clamp) for g in part.groups),
        unitwise=frozenset(
            g for part, (answer, _) in zip(parts, answers, strict=True) if isinstance(answer, UnitScale) for g in part.groups
        ),
        skip=torch.stack(skips).any() if skips else torch.zeros((), dtype=torch.bool, device=norms.total.device),
    ), new


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
        return answer.coef, answer.threshold, answer.coef != 1, norms.per_group * answer.coef, one
    if isinstance(answer, Clamp):
        return one, answer.value, answer.clipped, answer.norm_after, answer.cosine
    return one, answer.threshold, answer.clipped, answer.norm_after, one


def _placed(parts: Sequence[Part], values: Sequence[Tensor], like: Tensor) -> Tensor:
    """[groups]: the parts' values side by side."""
    if len(parts) == 1:
        return values[0]
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


def moved(state: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    return _like(state, (t.to(device) for t in state))


def _like(state: tuple[Tensor, ...], values: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return getattr(state, "_make", tuple)(values)


def describe_rules(rules: Mapping[str, Any], describe: Any) -> str:
    return ", ".join(f"{name}: {rule if isinstance(rule, (int, float, Exempt)) else describe(rule)}" for name, rule in rules.items())
