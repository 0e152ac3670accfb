"""Which parameters share a norm and a threshold."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from distclip.errors import ConfigError
from distclip.passed import check_flag
from distclip.torch_internals.grad_scaler import inner_optimizers, unwrap_optimizer


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
    """Gives each parameter the name of its group. One of your own derives from this class and has
    an `assign`, and a `__repr__` that is equal on all ranks for equal groupings."""

    @abstractmethod
    def assign(self, names: Sequence[str], params: Sequence[Tensor]) -> list[str]:
        """[parameters]: the groups' names.

        Args:
            names: equal on all ranks that hold a part of a parameter.
        """

    def rules(self) -> Mapping[str, Rule]:
        """Group name → its own rule; groups without one follow the clipper's policy."""
        return {}

    def patterns(self) -> Sequence[str]:
        """Patterns that must each match a parameter on some rank."""
        return ()

    def needs(self, params: Sequence[Tensor]) -> Mapping[str, int]:
        """What else must be there: the text of the error, equal on all ranks, that is raised where
        there is none on any → how many there are here."""
        return {}

    def cuts(self, names: Sequence[str]) -> Sequence[bool]:
        """Which parameters are cut along their first dimension: each index has a norm of its
        own."""
        return [False] * len(names)


def check_grouping(what: str, grouping: Any) -> None:
    """ConfigError for one of the user's own that is not derived from `Grouping` and lacks what that
    class gives. `what` was passed."""
    asked = [name for name in vars(Grouping) if not name.startswith("_")]
    lacks = [name for name in asked if not callable(getattr(grouping, name, None))]
    if lacks:
        raise ConfigError(
            f"{what} is a {type(grouping).__name__} without {', '.join(lacks)}; derive it from "
            "distclip.groups.Grouping, which has them"
        )


@dataclass(frozen=True)
class _WholeModel(Grouping):
    def assign(self, names: Sequence[str], params: Sequence[Tensor]) -> list[str]:
        return ["all"] * len(names)


@dataclass(frozen=True)
class _PerParameter(Grouping):
    def assign(self, names: Sequence[str], params: Sequence[Tensor]) -> list[str]:
        return list(names)


@dataclass(frozen=True)
class _PerLayer(Grouping):
    depth: int = 1

    def assign(self, names: Sequence[str], params: Sequence[Tensor]) -> list[str]:
        return [".".join(name.split(".")[:-1][: self.depth]) or name for name in names]


@dataclass(frozen=True, eq=False)
class _PerParamGroup(Grouping):
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
class _ByName(Grouping):
    table: Mapping[str, Rule]

    def assign(self, names: Sequence[str], params: Sequence[Tensor]) -> list[str]:
        return [next((p for p in self.table if fnmatchcase(name, p)), "rest") for name in names]

    def rules(self) -> Mapping[str, Rule]:
        return self.table

    def patterns(self) -> Sequence[str]:
        return tuple(self.table)


@dataclass(frozen=True, eq=False)
class _ByOptimizer(_WholeModel):
    table: Mapping[type, Rule]
    optimizers: tuple[Any, ...]
    names: Mapping[type, str] = field(init=False)  # of the groups

    def __post_init__(self) -> None:
        count = Counter(kind.__qualname__ for kind in self.table)
        names = {
            kind: kind.__qualname__
            if count[kind.__qualname__] == 1
            else f"{kind.__module__}.{kind.__qualname__}"
            for kind in self.table
        }
        object.__setattr__(self, "names", names)

    def __repr__(self) -> str:
        return f"by_optimizer({', '.join(self.names.values())})"

    def assign(self, names: Sequence[str], params: Sequence[Tensor]) -> list[str]:
        groups: dict[int, str] = {}
        for holder in map(_holders_of, self.optimizers):
            for optimizer in holder:
                kinds = type(optimizer).__mro__
                name = next((self.names[kind] for kind in kinds if kind in self.names), None)
                if name is not None:
                    groups |= {id(p): name for p in _params_of(optimizer)} | groups
        return [groups.get(id(param), "rest") for param in params]

    def rules(self) -> Mapping[str, Rule]:
        return {self.names[kind]: rule for kind, rule in self.table.items()}

    def needs(self, params: Sequence[Tensor]) -> Mapping[str, int]:
        here = Counter(self.assign((), params))
        return {
            f"by_optimizer: no optimizer that was passed is a {name} and holds one of the "
            f"clipper's parameters, on any rank; pass it after the table, "
            f"by_optimizer({{...}}, optimizer), built after the model was wrapped and "
            f"sharded, or leave {name} out": here[name]
            for name in self.names.values()
        }


def _holders_of(optimizer: Any) -> list[Any]:
    """The optimizer, what it wraps, and all that it contains: the innermost first."""
    links = unwrap_optimizer(optimizer)
    return [*links, *inner_optimizers(links[-1])][::-1]


def _params_of(optimizer: Any) -> Iterator[Tensor]:
    return (param for group in getattr(optimizer, "param_groups", ()) for param in group["params"])


@dataclass(frozen=True)
class _PerExpert(Grouping):
    pattern: str
    others: Grouping | None

    def assign(self, names: Sequence[str], params: Sequence[Tensor]) -> list[str]:
        others = ["rest"] * len(names) if self.others is None else self.others.assign(names, params)
        return [
            name.rpartition(".")[0] or name if cut else other
            for name, cut, other in zip(names, self.cuts(names), others, strict=True)
        ]

    def patterns(self) -> Sequence[str]:
        return (self.pattern, *(() if self.others is None else self.others.patterns()))

    def needs(self, params: Sequence[Tensor]) -> Mapping[str, int]:
        return {} if self.others is None else self.others.needs(params)

    def cuts(self, names: Sequence[str]) -> Sequence[bool]:
        return [fnmatchcase(name, self.pattern) for name in names]


@dataclass(frozen=True)
class Watch:
    """Norms besides those that clipping uses: part of the same message, and in each report. Sinks
    get them at each `every`-th step and at all that matter (`ClipReport.matters`: skipped, an
    outlier, among the largest): `Watch(per_layer())` alone shows the layer of a spike in the log.

    Args:
        groups: what is watched; `per_layer()`, `per_parameter()`, `per_expert(pattern)` or
            `by_name` (whose thresholds are ignored).
        every: steps from one log of them to the next, whatever happens.

    Raises:
        ConfigError: every < 1.
    """

    groups: Grouping
    every: int = 10

    def __post_init__(self) -> None:
        if not hasattr(self.groups, "assign"):
            raise ConfigError(
                f"Watch: groups is a {type(self.groups).__name__}; pass distclip.per_layer(), "
                "per_parameter() or by_name({...})"
            )
        check_grouping("Watch: groups", self.groups)
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


def by_optimizer(table: Mapping[type, Rule], *optimizers: Any) -> Grouping:
    """Class of the optimizer that holds a parameter → threshold, policy or `Exempt`. What is held
    by an optimizer of another class, or by none of those given, is the group `rest`, under the main
    policy.

    `by_optimizer({torch.optim.Muon: Exempt()}, muon, adamw)` leaves to Muon, whose steps have a
    size of their own, what Muon steps. Groups bear the classes' names. Of a class's bases in the
    table the nearest counts: torch's AdamW is an Adam.

    Args:
        optimizers: those of this rank that may hold the clipper's parameters, built after wrapping
            and sharding. Wrappers and containers of several are looked through; the innermost
            class that the table names counts.

    Raises:
        ConfigError: the table is empty, has a key that is no class, or two classes of one module
            and name; no optimizer was given, or something else was. When the clipper is built, on
            all ranks: a class steps none of its parameters on any rank.
    """
    given: object = table
    wrong = (
        [key for key in table if not isinstance(key, type)] if isinstance(given, Mapping) else []
    )
    if not isinstance(given, Mapping) or not table or wrong:
        seen = f"{wrong[0]!r} is no class" if wrong else "the table is empty"
        if not isinstance(given, Mapping):
            seen = f"the table is a {type(given).__name__}"
        raise ConfigError(
            f"by_optimizer: {seen}; give classes of optimizers, such as "
            f"{{torch.optim.Muon: distclip.Exempt()}}"
        )
    others = [
        given
        for given in optimizers
        if isinstance(given, type)
        or not any(hasattr(o, "param_groups") for o in _holders_of(given))
    ]
    if not optimizers or others:
        seen = f"{others[0]!r} is no optimizer" if others else "no optimizer was given"
        raise ConfigError(
            f"by_optimizer: {seen}; pass the optimizers themselves after the table: "
            f"by_optimizer({{torch.optim.Muon: distclip.Exempt()}}, muon, adamw)"
        )
    grouping = _ByOptimizer(dict(table), optimizers)
    again = [
        name for name, n in Counter(grouping.names.values()).items() if n > 1 or name == "rest"
    ]
    if again:
        raise ConfigError(
            f"by_optimizer: groups bear the names of classes, and {again[0]} is the name of "
            f"another group too; give one of the classes another __qualname__"
        )
    return grouping


def per_expert(pattern: str, others: Grouping | None = None) -> Grouping:
    """For `Watch`: one norm for each expert of fused expert tensors [experts, ...], which are cut
    along their first dimension.

    What the shell-style `pattern` matches in one module makes up its experts together, named
    `layers.0.experts[07]`: one number for the weights in and out of the seventh. The p-th powers of
    a module's experts add up to that of its tensors. Under FSDP2, tensor and expert parallelism an
    expert is known by its index in the whole tensor; different tensors under one name (private to
    their ranks, by `replicated_over`) are numbered on, in the order of their lowest ranks. Costs
    no further read of the gradients and one word of the message for each expert.

    Args:
        pattern: of names of parameters, with the experts first: `"*.experts.*"`. One that matches
            nothing on any rank is an error when the clipper is built.
        others: what becomes of all other parameters, such as `per_layer()`; None is one norm,
            `rest`.

    Raises:
        ConfigError: `pattern` is no text, or `others` no grouping. When the clipper is built: a
            module's tensors differ in their number of experts; it was passed as `groups=`: a
            gradient tensor has one coefficient, so an expert cannot be clipped apart.
        PlacementError: when the clipper is built: FSDP1 or another sharding that cuts experts
            anywhere.
    """
    shell_style: object = pattern
    if not isinstance(shell_style, str):
        raise ConfigError(
            f"per_expert: pattern={pattern!r} is no text; it matches names of parameters, such as "
            f"'*.experts.*'"
        )
    if others is not None and (isinstance(others, type) or not hasattr(others, "assign")):
        raise ConfigError(
            f"per_expert: others={others!r}; pass a grouping, such as distclip.per_layer(), or None"
        )
    return _PerExpert(pattern, others)
