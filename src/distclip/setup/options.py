"""What the caller asked for, checked. Equal on every rank, or the set-up refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from torch import Tensor

from distclip.errors import ConfigError
from distclip.groups import ONE, Exempt, Grouping, Watch
from distclip.policies import FixedNorm, Policy
from distclip.policies.policy import describe

OnNonfinite: TypeAlias = Literal["skip", "raise", "propagate"]
MODES = ("skip", "raise", "propagate")
FOLDS = ("auto", "never")
PARTIAL_GRADS = ("refuse", "reduce")


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of `GradClipper` as they were passed."""

    max_norm: float | None
    policy: Policy | None
    norm_type: float
    groups: Grouping | None
    on_nonfinite: OnNonfinite
    drift_tolerance: float | None
    skip_limit: int
    fold: str
    watch: Watch | None
    partial_grads: str = "refuse"
    grad_of: Callable[[Tensor], Tensor | None] | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """The same, checked and with their meaning worked out."""

    policy: Policy
    norm_type: float
    grouping: Grouping
    on_nonfinite: OnNonfinite
    drift_tolerance: float | None
    skip_limit: int
    fold: str
    watch: Watch | None
    partial_grads: str

    def texts(self) -> dict[str, str]:
        """Option → a text that is equal on all ranks if the option is."""
        rules = describe_rules(self.grouping.rules(), describe)
        return {
            "policy": describe(self.policy),
            "norm_type": repr(self.norm_type),
            "groups": f"{type(self.grouping).__name__.strip('_')}({rules})",
            "on_nonfinite": repr(self.on_nonfinite),
            "drift_tolerance": repr(self.drift_tolerance),
            "skip_limit": repr(self.skip_limit),
            "fold": repr(self.fold),
            "partial_grads": repr(self.partial_grads),
            "watch": f"Watch({_described(self.watch.groups)}, every={self.watch.every})"
            if self.watch
            else "None",
        }


def _described(grouping: Grouping) -> str:
    """Its rules by `describe`: the repr of a table holds that of its policies, which may be an
    address."""
    rules = describe_rules(grouping.rules(), describe)
    return (
        f"{type(grouping).__name__.strip('_')}({rules})" if rules else describe(grouping).strip("_")
    )


def checked(asked: Asked) -> Options:
    """ConfigError for what cannot be honoured."""
    if (asked.max_norm is None) == (asked.policy is None):
        seen = "both" if asked.policy is not None else "neither"
        raise ConfigError(
            f"pass exactly one of max_norm and policy, not {seen}; there is no default threshold"
        )
    _check_kinds(asked)
    policy = asked.policy if asked.max_norm is None else FixedNorm(float(asked.max_norm))
    if policy is None or not (hasattr(policy, "init") and hasattr(policy, "decide")):
        raise ConfigError(
            f"policy={policy!r} has no init and decide; pass e.g. distclip.FixedNorm(1.0)"
        )
    p = float(asked.norm_type) if isinstance(asked.norm_type, (int, float)) else math.nan
    if not (0 < p <= 8 or p == math.inf):
        raise ConfigError(
            f"norm_type={asked.norm_type!r}: p must be above 0 and at most 8, or math.inf"
        )
    if asked.on_nonfinite not in MODES:
        raise ConfigError(
            f"on_nonfinite={asked.on_nonfinite!r}; it is one of {', '.join(map(repr, MODES))}"
        )
    if asked.fold not in FOLDS:
        raise ConfigError(f"fold={asked.fold!r}; it is 'auto' or 'never'")
    if asked.partial_grads not in PARTIAL_GRADS:
        raise ConfigError(
            f"partial_grads={asked.partial_grads!r}; it is one of "
            f"{', '.join(map(repr, PARTIAL_GRADS))}"
        )
    if asked.grad_of is not None and asked.partial_grads == "reduce":
        raise ConfigError(
            "partial_grads='reduce' sets .grad, and grad_of finds gradients "
            "elsewhere; redistribute them there"
        )
    if asked.drift_tolerance is not None and not asked.drift_tolerance > 0:
        raise ConfigError(
            f"drift_tolerance={asked.drift_tolerance!r} must be positive, or None, "
            f"which does not look for drift"
        )
    if asked.skip_limit < 0:
        raise ConfigError(
            f"skip_limit={asked.skip_limit!r} must not be negative; 0 allows no bad step"
        )
    if asked.watch is not None and not isinstance(asked.watch, Watch):
        raise ConfigError(
            f"watch={asked.watch!r}; pass distclip.Watch(distclip.per_layer(), every=100)"
        )
    by_units = [
        rule
        for rule in (policy, *(asked.groups or ONE).rules().values())
        if hasattr(rule, "unit_coefs")
    ]
    if by_units and p != 2:
        raise ConfigError(
            f"{describe(by_units[0])} works with 2-norms of units; norm_type={asked.norm_type!r} "
            f"cannot go with it, leave it at 2"
        )
    return Options(
        policy, p, asked.groups or ONE, asked.on_nonfinite, asked.drift_tolerance, asked.skip_limit, asked.fold, asked.watch,
        asked.partial_grads,
    )  # fmt: skip


def _check_kinds(asked: Asked) -> None:
    """ConfigError for what is of another kind than meant, which would fail later without a word of
    distclip's."""
    if asked.max_norm is not None and not hasattr(asked.max_norm, "__float__"):
        raise ConfigError(
            f"max_norm is a {type(asked.max_norm).__name__}; it is a number, the threshold of the "
            f"norm: GradClipper(model, max_norm=1.0)"
        )
    if isinstance(asked.policy, type):
        name = asked.policy.__name__
        raise ConfigError(f"policy={name} is the class; call it: policy=distclip.{name}(...)")
    grouping: object = asked.groups
    if grouping is not None and not hasattr(grouping, "assign"):
        if callable(grouping):
            name = getattr(grouping, "__name__", type(grouping).__name__)
            raise ConfigError(f"groups={name} is the function; call it: groups=distclip.{name}()")
        raise ConfigError(
            f"groups is a {type(grouping).__name__}; pass distclip.by_name({{pattern: threshold or "
            f"policy}}), per_parameter(), per_layer() "
            "or per_param_group(optimizer)"
        )
    for pattern, rule in (asked.groups or ONE).rules().items():
        if isinstance(rule, type):
            raise ConfigError(
                f"groups=by_name({{{pattern!r}: {rule.__name__}}}): that is the class; call it: "
                f"distclip.{rule.__name__}(...)"
            )


def describe_rules(rules: Mapping[str, Any], describe: Any) -> str:
    return ", ".join(
        f"{name}: {rule if isinstance(rule, (int, float, Exempt)) else describe(rule)}"
        for name, rule in rules.items()
    )


def check_sinks(sinks: Any, rank: int) -> None:
    """On the rank that writes. Elsewhere sinks are not looked at: `None` may stand there in the
    place of what only one rank has.

    Raises:
        ConfigError: one of them cannot take reports.
    """
    if not isinstance(sinks, Sequence):
        raise ConfigError(
            f"sinks={sinks!r} on rank {rank}, which writes; pass a list, such as "
            f"sinks=[distclip.JSONLSink('run.jsonl')]"
        )
    for i, sink in enumerate(cast("Sequence[Any]", sinks)):
        lacks = "it is None" if sink is None else getattr(sink, "lacks", "")
        if not lacks and (isinstance(sink, type) or not callable(getattr(sink, "write", None))):
            lacks = "it has no write(report)"
        if lacks:
            what = (
                repr(sink) if isinstance(sink, (type, str)) or sink is None else type(sink).__name__
            )
            raise ConfigError(
                f"sinks[{i}], {what}: {lacks} on rank {rank}, the first of the process group, "
                f"which writes. What is made on one rank "
                "alone (a run, a writer) must be made on this one; others may pass None"
            )
