"""A clipper's state as a flat record of tensors and strings, and back: equal on all ranks, independent of world size and sharding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distclip.deciding import Part, State
from distclip.errors import ConfigError
from distclip.history import History
from distclip.options import Options
from distclip.policies import describe


class Saved(NamedTuple):
    """What a clipper remembers from step to step."""

    step: int
    bad_in_a_row: int
    history: History
    state: State


def saved(of: Saved, options: Options, parts: Sequence[Part], groups: Sequence[str]) -> dict[str, Any]:
    """Loads with `weights_only`."""
    counters = {"step": torch.tensor(of.step), "bad_in_a_row": torch.tensor(of.bad_in_a_row)}
    history = {f"history.{name}": value.clone() for name, value in zip(of.history._fields, of.history, strict=True)}
    tensors = {f"{i}.{j}": t.clone() for i, part in enumerate(of.state) for j, t in enumerate(part)}
    # which policy has which groups: the main one alone does not say it
    rules = "\n".join(f"{describe(part.policy)}: {', '.join(groups[g] for g in part.groups)}" for part in parts)
    texts = {"policy": describe(options.policy), "groups": "\n".join(groups), "norm_type": repr(options.norm_type), "rules": rules}
    return {**counters, **texts, **history, **tensors}


def loaded(given: Mapping[str, Any], now: Mapping[str, Any], like: Saved) -> Saved:
    """Of the record `given`, as it fits a clipper that would save `now`.

    Raises:
        ConfigError: it was cut short, or belongs to another policy, another norm_type or other groups.
    """
    for name in [name for name, value in now.items() if isinstance(value, str) and name in given]:
        if given[name] != now[name]:
            raise ConfigError(f"the checkpoint's {name} is {given[name]!r}, this clipper's {now[name]!r}; build it as the saved one was")
    lost = sorted(now.keys() - given.keys())
    if lost:
        raise ConfigError(f"the checkpoint of the clipper lacks {', '.join(lost)}; it was cut short, or saved by something else")
    surplus = sorted(map(str, given.keys() - now.keys()))
    if surplus:
        raise ConfigError(f"the checkpoint of the clipper has {', '.join(surplus)}, this clipper has not; build it as the saved one was")
    for name in [name for name, value in now.items() if isinstance(value, Tensor)]:
        if not isinstance(given[name], Tensor) or given[name].shape != now[name].shape:
            seen = tuple(given[name].shape) if isinstance(given[name], Tensor) else type(given[name]).__name__
            raise ConfigError(f"the checkpoint's {name} is {seen}, not a tensor of shape {tuple(now[name].shape)}; was it cut short?")
    return Saved(
        int(given["step"]),
        int(given["bad_in_a_row"]),
        History(*(_like(given[f"history.{name}"], t) for name, t in zip(like.history._fields, like.history, strict=True))),
        tuple(tuple(_like(given[f"{i}.{j}"], t) for j, t in enumerate(part)) for i, part in enumerate(like.state)),
    )


def _like(given: Tensor, own: Tensor) -> Tensor:
    return given.to(own.device, own.dtype, copy=True)
