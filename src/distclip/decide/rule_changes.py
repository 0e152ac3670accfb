"""Rules whose numbers are other ones than in a checkpoint: allowed, and said once; other rules are
not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple


class RuleChange(NamedTuple):
    """A rule whose numbers are other ones than in the checkpoint."""

    old: str
    new: str
    groups: str  # empty where the rule is the main policy, which may govern none


def rule_changes(name: str, given: object, now: str) -> list[RuleChange] | None:
    """What differs between two texts of a checkpoint; None where it is more than the numbers of a
    rule."""
    if given == now:
        return []
    if name not in ("policy", "rules") or not isinstance(given, str):
        return None
    # `rules` has a line for each policy, its groups behind it
    old, new = (
        [(text, "")] if name == "policy" else list(map(_rule_and_groups, text.splitlines()))
        for text in (given, now)
    )
    if len(old) != len(new):
        return None
    changes = list[RuleChange]()
    for (was, groups), (rule, others) in zip(old, new, strict=True):
        if groups != others or _kind_of_rule(was) != _kind_of_rule(rule):
            return None
        if _numbers_in(was) != _numbers_in(rule):
            changes.append(RuleChange(was, rule, groups))
    return changes


def _rule_and_groups(line: str) -> tuple[str, str]:
    rule, _, groups = line.rpartition(": ")
    return rule, groups


_NUMBER = re.compile(r"(?<![\w.])-?(?:\d+(?:\.\d*)?(?:e[+-]?\d+)?|inf|nan)(?![\w.])")
_WRAPPED = re.compile(r"\b(?:np|numpy)\.\w+\(#\)")  # np.float64(#)
_SEVERAL = re.compile(r"(?<![\w>])[(\[]#(?:, #)*,?[)\]]")  # (#, #), but not Rule(#, #)


def _kind_of_rule(rule: str) -> str:
    """A rule's description without its numbers: sequences of numbers are alike, however many they
    hold."""
    kind, before = _WRAPPED.sub("#", _NUMBER.sub("#", rule)), ""
    while kind != before:
        kind, before = _SEVERAL.sub("#", kind), kind
    return kind


def _numbers_in(rule: str) -> list[float]:
    return [float(number) for number in _NUMBER.findall(rule)]


def describe_changes(changes: Sequence[RuleChange]) -> str:
    """Each once: the main policy is told with the groups that it governs."""
    governing = {change[:2] for change in changes if change.groups}
    told = [change for change in changes if change.groups or change[:2] not in governing]
    each = [
        f"{old} became {new}" + (f" ({_first_groups(groups)})" if groups else "")
        for old, new, groups in told
    ]
    return f"a rule of the clipper has another number than in the checkpoint: {'; '.join(each)}"


def _first_groups(groups: str) -> str:
    first, *more = groups.split(", ", maxsplit=3)
    return ", ".join([first, *more[:2]]) + (
        f" and {more[2].count(', ') + 1} more" if len(more) == 3 else ""
    )
