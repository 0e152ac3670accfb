"""A clipper's state as a flat record of tensors and strings, and back: equal on all ranks,
independent of world size and sharding."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distclip.decide.enforce import user_stacklevel
from distclip.decide.history import History
from distclip.errors import ConfigError
from distclip.policies import describe
from distclip.policies.assignment import PolicyAssignment
from distclip.policies.state import State
from distclip.setup.options import Options


class Saved(NamedTuple):
    """What a clipper remembers from step to step."""

    step: int
    bad_in_a_row: int
    history: History
    state: State


def saved(
    of: Saved, options: Options, parts: Sequence[PolicyAssignment], groups: Sequence[str]
) -> dict[str, Any]:
    """Loads with `weights_only`."""
    counters = {
        "step": torch.tensor(of.step, device="cpu"),
        "bad_in_a_row": torch.tensor(of.bad_in_a_row, device="cpu"),
    }
    history = {
        f"history.{name}": value.clone()
        for name, value in zip(of.history._fields, of.history, strict=True)
    }
    tensors = {f"{i}.{j}": t.clone() for i, part in enumerate(of.state) for j, t in enumerate(part)}
    # which policy has which groups: the main one alone does not say it
    rules = "\n".join(
        f"{describe(part.policy)}: {', '.join(groups[g] for g in part.groups)}" for part in parts
    )
    texts = {
        "policy": describe(options.policy),
        "groups": "\n".join(groups),
        "norm_type": repr(options.norm_type),
        "rules": rules,
    }
    return {**counters, **texts, **history, **tensors}


def loaded(given: Mapping[str, Any], now: Mapping[str, Any], like: Saved) -> Saved:
    """Of the record `given`, as it fits a clipper that would save `now`.

    The numbers of a rule may differ: those of the clipper hold, which one RuntimeWarning says.

    Raises:
        ConfigError: it was cut short, or belongs to another kind of policy, another norm_type or
            other groups; or a number differs that the size of the state depends on.
    """
    changes = list[_Change]()
    for name in [name for name, value in now.items() if isinstance(value, str) and name in given]:
        found = _changes(name, given[name], now[name])
        if found is None:
            raise ConfigError(
                f"the checkpoint's {name} is {given[name]!r}, this clipper's "
                f"{now[name]!r}; build it as the saved one was"
            )
        changes += found
    lost = sorted(now.keys() - given.keys())
    if lost:
        raise ConfigError(
            f"the checkpoint of the clipper lacks {', '.join(lost)}; it was cut "
            f"short, or saved by something else"
        )
    surplus = sorted(map(str, given.keys() - now.keys()))
    if surplus:
        raise ConfigError(
            f"the checkpoint of the clipper has {', '.join(surplus)}, this clipper "
            f"has not; build it as the saved one was"
        )
    for name in [name for name, value in now.items() if isinstance(value, Tensor)]:
        if not isinstance(given[name], Tensor) or given[name].shape != now[name].shape:
            seen = (
                tuple(given[name].shape)
                if isinstance(given[name], Tensor)
                else type(given[name]).__name__
            )
            if changes and not name.startswith("history."):
                raise ConfigError(
                    f"{_told(changes)}, and this number cannot change at resume: the checkpoint's "
                    f"{name} is {seen}, this clipper's "
                    f"{tuple(now[name].shape)}. Build it with the saved number, or resume without "
                    f"the clipper's state to start it anew"
                )
            raise ConfigError(
                f"the checkpoint's {name} is {seen}, not a tensor of shape "
                f"{tuple(now[name].shape)}; was it cut short?"
            )
    if changes:
        warnings.warn(
            f"{_told(changes)}: the new number holds from the next step on, and steps and "
            f"statistics go on from the checkpoint. If that is "
            "meant there is nothing to do; to start the statistics anew, resume without the "
            "clipper's state",
            RuntimeWarning,
            stacklevel=user_stacklevel(),
        )
    return Saved(
        int(given["step"]),
        int(given["bad_in_a_row"]),
        History(
            *(
                _like(given[f"history.{name}"], t)
                for name, t in zip(like.history._fields, like.history, strict=True)
            )
        ),
        tuple(
            tuple(_like(given[f"{i}.{j}"], t) for j, t in enumerate(part))
            for i, part in enumerate(like.state)
        ),
    )


class _Change(NamedTuple):
    """A rule whose numbers are other ones than in the checkpoint."""

    old: str
    new: str
    groups: str  # empty where the rule is the main policy, which may govern none


def _changes(name: str, given: object, now: str) -> list[_Change] | None:
    """What differs between two texts of `saved`; None where it is more than the numbers of a
    rule."""
    if given == now:
        return []
    if name not in ("policy", "rules") or not isinstance(given, str):
        return None
    # `rules` has a line for each policy, its groups behind it
    old, new = (
        [(text, "")] if name == "policy" else list(map(_parted, text.splitlines()))
        for text in (given, now)
    )
    if len(old) != len(new):
        return None
    changes = list[_Change]()
    for (was, groups), (rule, others) in zip(old, new, strict=True):
        if groups != others or _kind(was) != _kind(rule):
            return None
        if _numbers(was) != _numbers(rule):
            changes.append(_Change(was, rule, groups))
    return changes


def _parted(line: str) -> tuple[str, str]:
    rule, _, groups = line.rpartition(": ")
    return rule, groups


_NUMBER = re.compile(r"(?<![\w.])-?(?:\d+(?:\.\d*)?(?:e[+-]?\d+)?|inf|nan)(?![\w.])")
_WRAPPED = re.compile(r"\b(?:np|numpy)\.\w+\(#\)")  # np.float64(#)
_SEVERAL = re.compile(r"(?<![\w>])[(\[]#(?:, #)*,?[)\]]")  # (#, #), but not Rule(#, #)


def _kind(rule: str) -> str:
    """A rule's description without its numbers: sequences of numbers are alike, however many they
    hold."""
    kind, before = _WRAPPED.sub("#", _NUMBER.sub("#", rule)), ""
    while kind != before:
        kind, before = _SEVERAL.sub("#", kind), kind
    return kind


def _numbers(rule: str) -> list[float]:
    return [float(number) for number in _NUMBER.findall(rule)]


def _told(changes: Sequence[_Change]) -> str:
    """Each once: the main policy is told with the groups that it governs."""
    governing = {change[:2] for change in changes if change.groups}
    told = [change for change in changes if change.groups or change[:2] not in governing]
    each = [
        f"{old} became {new}" + (f" ({_brief(groups)})" if groups else "")
        for old, new, groups in told
    ]
    return f"a rule of the clipper has another number than in the checkpoint: {'; '.join(each)}"


def _brief(groups: str) -> str:
    first, *more = groups.split(", ", maxsplit=3)
    return ", ".join([first, *more[:2]]) + (
        f" and {more[2].count(', ') + 1} more" if len(more) == 3 else ""
    )


def _like(given: Tensor, own: Tensor) -> Tensor:
    return given.to(own.device, own.dtype, copy=True)
