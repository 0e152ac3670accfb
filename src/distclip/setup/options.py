"""The options that the caller passed, checked. Equal on every rank, or the set-up raises."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from torch import Tensor

from distclip.errors import ConfigError
from distclip.groups import WHOLE_MODEL, Exempt, Grouping, Watch, check_grouping
from distclip.passed import as_number, is_text
from distclip.policies import FixedNorm, Policy
from distclip.policies.assignment import describe_rules
from distclip.policies.policy import UnitPolicy, describe, is_policy, shown

OnNonfinite: TypeAlias = Literal["skip", "raise", "propagate"]
MODES = ("skip", "raise", "propagate")
FOLDS = ("auto", "never")
PARTIAL_GRADS = ("refuse", "reduce")


@dataclass(frozen=True, slots=True)
class PassedOptions:
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
    rank_norms: Any = None  # a RankNorms
    replicated_over: Any = None
    shared: Any = ()


@dataclass(frozen=True, slots=True)
class ClipOptions:
    """The same options, checked, with defaults filled in."""

    policy: Policy
    norm_type: float
    grouping: Grouping
    on_nonfinite: OnNonfinite
    drift_tolerance: float | None
    skip_limit: int
    fold: str
    watch: Watch | None
    partial_grads: str
    by_rank: bool = False  # each rank's own norm is asked for

    def config_texts(self) -> dict[str, str]:
        """Option → a text that is equal on all ranks if the option is."""
        rules = describe_rules(self.grouping.rules())
        return {
            "policy": describe(self.policy),
            "norm_type": repr(self.norm_type),
            "groups": f"{type(self.grouping).__name__.strip('_')}({rules})",
            "on_nonfinite": repr(self.on_nonfinite),
            "drift_tolerance": repr(self.drift_tolerance),
            "skip_limit": repr(self.skip_limit),
            "fold": repr(self.fold),
            "partial_grads": repr(self.partial_grads),
            "rank_norms": "RankNorms" if self.by_rank else "None",
            "watch": f"Watch({_describe_grouping(self.watch.groups)}, every={self.watch.every})"
            if self.watch
            else "None",
        }


def _describe_grouping(grouping: Grouping) -> str:
    """Its rules by `describe`: the repr of a table holds that of its policies, which may be an
    address."""
    rules = describe_rules(grouping.rules())
    return (
        f"{type(grouping).__name__.strip('_')}({rules})" if rules else describe(grouping).strip("_")
    )


def check_options(passed: PassedOptions) -> ClipOptions:
    """ConfigError for what cannot be honoured."""
    if (passed.max_norm is None) == (passed.policy is None):
        seen = "both" if passed.policy is not None else "neither"
        raise ConfigError(
            f"pass exactly one of max_norm and policy, not {seen}; there is no default threshold"
        )
    _check_kinds(passed)
    policy = passed.policy
    if passed.max_norm is not None:
        number = as_number(passed.max_norm)
        policy = FixedNorm(passed.max_norm if math.isnan(number) else number)
    if policy is None or not is_policy(policy):
        raise ConfigError(
            f"policy={shown(policy)} has no init and decide; pass e.g. distclip.FixedNorm(1.0)"
        )
    p = as_number(passed.norm_type)
    if not (0 < p <= 8 or p == math.inf):
        raise ConfigError(
            f"norm_type={passed.norm_type!r}: p must be above 0 and at most 8, or math.inf"
        )
    if not is_text(passed.on_nonfinite, *MODES):
        raise ConfigError(
            f"on_nonfinite={passed.on_nonfinite!r}; it is one of {', '.join(map(repr, MODES))}"
        )
    if not is_text(passed.fold, *FOLDS):
        raise ConfigError(f"fold={passed.fold!r}; it is 'auto' or 'never'")
    if not is_text(passed.partial_grads, *PARTIAL_GRADS):
        raise ConfigError(
            f"partial_grads={passed.partial_grads!r}; it is one of "
            f"{', '.join(map(repr, PARTIAL_GRADS))}"
        )
    if passed.grad_of is not None and passed.partial_grads == "reduce":
        raise ConfigError(
            "partial_grads='reduce' sets .grad, and grad_of finds gradients "
            "elsewhere; redistribute them there"
        )
    tolerance = None if passed.drift_tolerance is None else as_number(passed.drift_tolerance)
    if tolerance is not None and not tolerance > 0:
        raise ConfigError(
            f"drift_tolerance={passed.drift_tolerance!r} must be positive, or None, "
            f"which does not look for drift"
        )
    if not isinstance(passed.skip_limit, int) or passed.skip_limit < 0:
        raise ConfigError(
            f"skip_limit={passed.skip_limit!r} must be a whole number, not negative; 0 allows no "
            "bad step"
        )
    if passed.grad_of is not None and not callable(passed.grad_of):
        raise ConfigError(
            f"grad_of={passed.grad_of!r} is no function; pass one from a parameter to its gradient"
        )
    if passed.watch is not None and not isinstance(passed.watch, Watch):
        raise ConfigError(f"watch={passed.watch!r}; pass distclip.Watch(distclip.per_layer())")
    if passed.rank_norms is not None and not hasattr(passed.rank_norms, "ranks"):
        raise ConfigError(
            f"rank_norms={passed.rank_norms!r}; pass distclip.RankNorms(model), built after "
            f"wrapping"
        )
    by_units = [
        rule
        for rule in (policy, *(passed.groups or WHOLE_MODEL).rules().values())
        if isinstance(rule, UnitPolicy)
    ]
    if by_units and p != 2:
        raise ConfigError(
            f"{describe(by_units[0])} works with 2-norms of units; norm_type={passed.norm_type!r} "
            f"cannot go with it, leave it at 2"
        )
    return ClipOptions(
        policy=policy,
        norm_type=p,
        grouping=passed.groups or WHOLE_MODEL,
        on_nonfinite=passed.on_nonfinite,
        drift_tolerance=tolerance,
        skip_limit=passed.skip_limit,
        fold=passed.fold,
        watch=passed.watch,
        partial_grads=passed.partial_grads,
        by_rank=passed.rank_norms is not None,
    )


def _check_kinds(passed: PassedOptions) -> None:
    """ConfigError for arguments of a wrong type, which would fail later with an error that does not
    name the argument."""
    if passed.max_norm is not None and not hasattr(passed.max_norm, "__float__"):
        raise ConfigError(
            f"max_norm is a {type(passed.max_norm).__name__}; it is a number, the threshold of the "
            f"norm: GradClipper(model, max_norm=1.0)"
        )
    if isinstance(passed.policy, type):
        name = passed.policy.__name__
        raise ConfigError(f"policy={name} is the class; call it: policy=distclip.{name}(...)")
    grouping: object = passed.groups
    if grouping is not None and not hasattr(grouping, "assign"):
        if callable(grouping):
            name = getattr(grouping, "__name__", type(grouping).__name__)
            raise ConfigError(f"groups={name} is the function; call it: groups=distclip.{name}()")
        raise ConfigError(
            f"groups is a {type(grouping).__name__}; pass distclip.by_name({{pattern: threshold or "
            f"policy}}), per_parameter(), per_layer() "
            "or per_param_group(optimizer)"
        )
    if grouping is not None:
        check_grouping("groups", grouping)
    for key, rule in (passed.groups or WHOLE_MODEL).rules().items():
        if isinstance(rule, type):
            raise ConfigError(
                f"groups: the rule of {key!r} is {rule.__name__}, the class; call it: "
                f"distclip.{rule.__name__}(...)"
            )
        if not (isinstance(rule, Exempt) or is_policy(rule) or as_number(rule) >= 0):
            raise ConfigError(
                f"groups: the rule of {key!r} is {shown(rule)}, which is no threshold; give a "
                "number, a policy or distclip.Exempt()"
            )


def check_sinks(sinks: Any, rank: int) -> None:
    """Check the sinks, on the rank of a clipper's group that writes. Other ranks' are not looked
    at.

    Args:
        rank: the global one. What is None is an error on the world's first rank alone: where a
            group begins elsewhere, that rank may be one that does not write.

    Raises:
        ConfigError: one of them cannot take reports.
    """
    if sinks is None and rank:
        return
    if not isinstance(sinks, Sequence) or isinstance(sinks, str):
        raise ConfigError(
            f"sinks={sinks!r} on rank {rank}, which writes; pass a list, such as "
            f"sinks=[distclip.JSONLSink('run.jsonl')]"
        )
    for i, sink in enumerate(cast("Sequence[Any]", sinks)):
        is_sink = sink is None or takes_reports(sink)
        lacks = why_unwritable(sink) if is_sink else "it has no write(report) and is no function"
        if lacks and not (rank and is_sink):
            what = (
                repr(sink) if isinstance(sink, (type, str)) or sink is None else type(sink).__name__
            )
            raise ConfigError(
                f"sinks[{i}], {what}: {lacks} on rank {rank}, the first of the process group, "
                f"which writes. What is made on one rank "
                "alone (a run, a writer) must be made on this one; others may pass None"
            )


def takes_reports(sink: object) -> bool:
    """Whether it has a method `write`, or is itself called with a report."""
    return not isinstance(sink, type) and (callable(getattr(sink, "write", None)) or callable(sink))


def why_unwritable(sink: object) -> str:
    """What a sink cannot write without; empty where it can."""
    return "it is None" if sink is None else getattr(sink, "lacks", "")
