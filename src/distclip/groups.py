"""Which parameters share a norm and a threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from distclip.errors import ConfigError
from distclip.passed import check_flag


@dataclass(frozen=True)
class Exempt:
    """A group that is never clipped.

    Args:
        in_total: whether its gradients count in `total_norm`.
    """

    in_total: bool = False

    def __post_init__(self) -> None:
        check_flag("Exempt: in_total", self.in_total)


Rule: TypeAlias = "float | Exempt | Any"  # a threshold, no clipping, or a policy


class Grouping(Protocol):
    """Gives each parameter the name of its group."""

    def assign(self, names: Sequence[str], params: Sequence[Tensor]) -> list[str]: ...

    def rules(self) -> Mapping[str, Rule]:
        """Group name → its own rule; groups without one follow the clipper's policy."""
        ...

    def patterns(self) -> Sequence[str]:
        """Patterns that must each match a parameter on some rank."""
        ...


@dataclass(frozen=True)
class _WholeModel:
    def assign(self, names: Sequence[str], params: Sequence[Tensor]) -> list[str]:
        return ["all"] * len(names)

    def rules(self) -> Mapping[str, Rule]:
        return {}

    def patterns(self) -> Sequence[str]:
        return ()


@dataclass(frozen=True)
class _PerParameter(_WholeModel):
    def assign(self, names: Sequence[str], params: Sequence[Tensor]) -> list[str]:
        return list(names)


@dataclass(frozen=True)
class _PerLayer(_WholeModel):
    depth: int = 1

    def assign(self, names: Sequence[str], params: Sequence[Tensor]) -> list[str]:
        return [".".join(name.split(".")[:-1][: self.depth]) or name for name in names]


@dataclass(frozen=True, eq=False)
class _PerParamGroup(_WholeModel):
    optimizer: Optimizer

    def __repr__(self) -> str:
        return f"per_param_group({len(self.optimizer.param_groups)} groups)"

    def assign(self, names: Sequence[str], params: Sequence[Tensor]) -> list[str]:
        groups = {
            id(p): f"param_group {i}"
            for i, group in enumerate(self.optimizer.param_groups)
            for p in group["params"]
        }
        return [groups.get(id(param), "rest") for param in params]


@dataclass(frozen=True)
class _ByName:
    table: Mapping[str, Rule]

    def assign(self, names: Sequence[str], params: Sequence[Tensor]) -> list[str]:
        return [next((p for p in self.table if fnmatchcase(name, p)), "rest") for name in names]

    def rules(self) -> Mapping[str, Rule]:
        return self.table

    def patterns(self) -> Sequence[str]:
        return tuple(self.table)


@dataclass(frozen=True)
class Watch:
    """Norms besides those that clipping uses: they are part of the same message, and in the report
    of each `every`-th step.

    Args:
        groups: what is watched; `per_layer()`, `per_parameter()` or `by_name` (whose thresholds are
            ignored).
        every: steps from one report of them to the next; `measure()` always reports them.

    Raises:
        ConfigError: every < 1.
    """

    groups: Grouping
    every: int = 1

    def __post_init__(self) -> None:
        if not hasattr(self.groups, "assign"):
            raise ConfigError(
                f"Watch: groups is a {type(self.groups).__name__}; pass distclip.per_layer(), "
                "per_parameter() or by_name({...})"
            )
        if not isinstance(self.every, int) or self.every < 1:
            raise ConfigError(f"Watch: every={self.every!r} counts steps, from 1")


WHOLE_MODEL: Grouping = _WholeModel()


def per_parameter() -> Grouping:
    """Each parameter by its own norm (Keras' `clipnorm`)."""
    return _PerParameter()


def per_layer(depth: int = 1) -> Grouping:
    """Parameters whose names share their first `depth` components, the parameter's own left aside.

    Raises:
        ConfigError: depth < 1.
    """
    if not isinstance(depth, int) or depth < 1:
        raise ConfigError(f"per_layer: depth={depth!r}; it counts the components of a name, from 1")
    return _PerLayer(depth)


def per_param_group(optimizer: Optimizer) -> Grouping:
    """The optimizer's param groups; parameters that it does not have form the group `rest`.

    Raises:
        ConfigError: something else than an optimizer was passed.
    """
    if isinstance(optimizer, type) or not hasattr(optimizer, "param_groups"):
        raise ConfigError(
            f"per_param_group: optimizer={optimizer!r} has no param_groups; pass the optimizer"
        )
    return _PerParamGroup(optimizer)


def by_name(table: Mapping[str, Rule]) -> Grouping:
    """Shell-style pattern → threshold, policy or `Exempt`. The first match wins; what none matches
    is the group `rest`.

    Raises:
        ConfigError: the table is empty, is no mapping of texts, or names a group `rest`.
    """
    if not isinstance(table, Mapping) or not all(isinstance(name, str) for name in table):
        raise ConfigError(
            f"by_name({table!r}): pass a dictionary of patterns, "
            "{'head.*': 5.0, '*.bias': distclip.Exempt()}"
        )
    if not table or "rest" in table:
        raise ConfigError(
            f"by_name({dict(table)!r}): give at least one pattern; `rest` is the "
            f"group of what no pattern matches"
        )
    return _ByName(dict(table))
