"""Hugging Face Accelerate: the training loop is unchanged, and `accelerator.clip_grad_norm_` clips
through distclip.

    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    clipper = prepare(accelerator, model, max_norm=1.0)
    ...
    accelerator.clip_grad_norm_(model.parameters(), 1.0)  # as before

Written against accelerate 1.15. It uses the private names `_optimizers` and `_custom_objects`, and
checks that they exist.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distclip import ClipReport, ConfigError, FixedValue, GradClipper, Policy
from distclip.integrations import raise_missing_extra
from distclip.integrations.clipping_scope import ClippingScope, PreparedModels
from distclip.integrations.deferred_scaler_update import DeferredScalerUpdate, unscale_once
from distclip.integrations.joined_ranks import join_all_ranks
from distclip.integrations.set_aside import params_of, stepped_by

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import DistributedType
except ModuleNotFoundError as error:
    raise_missing_extra(error, "accelerate")

_SUPPORTED_TYPES = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
)
_MOST_PARTS = (
    16  # clippers for parts that are kept: a new bound at every step must not accumulate them
)


def prepare(
    accelerator: Accelerator,
    *models: nn.Module,
    max_norm: float | None = None,
    policy: Policy | None = None,
    **options: Any,
) -> GradClipper:
    """A clipper for `models`, which `accelerator.clip_grad_norm_` and `clip_grad_value_` use from
    now on. A collective.

    Call it after `accelerator.prepare`, once for each model (or set of models) that is clipped by a
    norm of its own; a second call for a model replaces the first one's clipper. Its state is saved
    by `accelerator.save_state` and loaded by `load_state`. `accelerator.free_memory()` drops it
    together with its models.

    Afterwards, in the same way on every rank:

    * Exactly the parameters that are passed are measured and clipped, each once, frozen ones too
      where they have a gradient.
    * `clip_grad_norm_(parameters, max_norm, norm_type)` takes a model's parameters, a part of them,
      or those of several models, and returns the global norm before clipping, a plain 0-dim tensor.
      For a whole model `max_norm` and `norm_type` must be those given here (None under a `policy`,
      for all parameters that train now): two thresholds for one model are a mistake. For a part, or
      for all that trains where the rest is frozen, they may differ; `groups`, `policy` and `sinks`
      apply to whole models. The first call for parts, and each with a new bound, is a collective
      set-up.
    * `clip_grad_value_(parameters, clip_value)` works on sharded models too.
    * Only the optimizers that hold the given parameters are unscaled. With several optimizers the
      scaler is updated once a round, when the next loss is scaled, and not after each optimizer's
      step, by which Accelerate unscales the others twice.
    * On a micro-step of gradient accumulation nothing is done or sent, and the result is NaN.
    * A step that is not finite is skipped on all ranks: the gradients of the optimizers concerned
      are set to None, and `optimizer.step()` changes nothing.
    * With `tp_size` in a `ParallelismConfig` all ranks work on the same modules, whether or not
      any parameter is split by it; pass `replicated_over` where that is not so.
    * Inside `accelerator.join_uneven_inputs` a clip is refused: a rank that ran out of batches does
      not take part in it.

    Under DeepSpeed `accelerator.backward()` already takes the step, so distclip decides there, in
    place of the engine's own clipping (see `distclip.integrations.deepspeed.attach`);
    `clip_grad_norm_` then returns that step's norm. Clipping by value or parts of the model is
    refused: use `policy=` and `groups=`.

    Args:
        options: those of `GradClipper`; under DeepSpeed those of `attach`.

    Raises:
        ConfigError: no model, an option that cannot be honoured, or a framework under which
            Accelerate does not own the step.
    """
    if not models:
        raise ConfigError(
            "prepare(accelerator, model, max_norm=...) needs the model that accelerator.prepare "
            "returned"
        )
    if "grad_of" in options:
        raise ConfigError(
            "prepare(accelerator, ..., grad_of=): Accelerate steps what is in .grad; use "
            "GradClipper itself for other gradients"
        )
    if accelerator.distributed_type not in _SUPPORTED_TYPES:
        raise ConfigError(
            f"accelerate's distributed type {accelerator.distributed_type.value} is not supported"
        )
    if not hasattr(accelerator, "_optimizers") or not hasattr(accelerator, "_custom_objects"):
        raise ConfigError(
            "this version of accelerate keeps its optimizers elsewhere; distclip was "
            "written against accelerate 1.15"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        clipper = _attach_engine(models, max_norm, policy, options)
    else:
        parallelism = getattr(accelerator, "parallelism_config", None)
        if parallelism is not None and parallelism.tp_enabled:
            options = join_all_ranks(options)
        clipper = GradClipper(list(models), max_norm, policy=policy, **options)
    scope = _AcceleratorScope.scope_of(accelerator) or _AcceleratorScope(accelerator)
    scope.add_prepared(
        _PreparedClipper(models, max_norm, float(options.get("norm_type", 2.0)), options, clipper)
    )
    return clipper


def set_expected_max_norm(accelerator: Accelerator, clipper: GradClipper, max_norm: float) -> None:
    """From now on `clip_grad_norm_` for this clipper's models must be called with `max_norm`,
    whatever the clipper was built with."""
    scope = _AcceleratorScope.scope_of(accelerator)
    assert scope is not None, "prepare comes first"
    for prepared in scope.prepared:
        if prepared.clipper is clipper:
            prepared.max_norm = max_norm


def release(accelerator: Accelerator, clipper: GradClipper) -> None:
    """Stop clipping by this clipper; without any, Accelerate clips by itself again."""
    scope = _AcceleratorScope.scope_of(accelerator)
    if scope is not None:
        scope.forget_prepared(
            [prepared for prepared in scope.prepared if prepared.clipper is clipper]
        )
        if not scope.prepared:
            scope.give_back()


def _attach_engine(
    models: Sequence[Any], max_norm: float | None, policy: Policy | None, options: dict[str, Any]
) -> GradClipper:
    from distclip.integrations.deepspeed import attach

    if len(models) != 1:
        raise ConfigError(
            f"prepare got {len(models)} models; under DeepSpeed call it once for each engine"
        )
    return attach(models[0], max_norm, policy=policy, take_over=True, **options)


@dataclass
class _PreparedClipper(PreparedModels):
    clipper: GradClipper

    def rest_of_models(self, selected: Mapping[int, Tensor]) -> list[Tensor] | None:
        """The models' parameters that are not in `selected`; None unless that has all that train
        now, and none of another model."""
        own = self.params_by_id()
        others = [param for i, param in own.items() if i not in selected]
        return (
            others
            if selected.keys() <= own.keys() and not any(p.requires_grad for p in others)
            else None
        )

    def accepts_norm(self, max_norm: float | None, norm_type: float, whole: bool) -> bool:
        """Whether this clipper has the given norm. ConfigError if it has not and the whole model
        is clipped, or a policy decides."""
        same = self.has_norm(max_norm, norm_type)
        if not same and (whole or self.max_norm is None):
            raise ConfigError(
                f"clip_grad_norm_ was called with max_norm={max_norm}, norm_type={norm_type:g}, "
                f"but distclip was prepared with "
                f"max_norm={self.max_norm}, norm_type={self.norm_type:g} for this model; make them "
                f"equal" + (" (under a policy max_norm is None)" if self.max_norm is None else "")
            )
        return same


class _PartKey(NamedTuple):
    """The key of a clipper for a part. It does not depend on which parameters are clipped, so that
    ranks build one together."""

    models: tuple[int, ...]  # their identities
    # positions of those that hold the parameters: streaks of bad steps are counted for each
    optimizers: tuple[int, ...]
    rule: str
    bound: float
    norm_type: float


class _OwningOptimizer(NamedTuple):
    position: int  # among the accelerator's optimizers
    optimizer: AcceleratedOptimizer
    held: dict[int, Tensor]  # by identity


class _WholeClip:
    """The last clip of whole models of which optimizers step every parameter: what it follows from,
    object by object, and what that is. Going through modules by `parameters()` at each step would
    cost as much as a small clip.

    Args:
        passed: parameters, as they were given; optimizers: all of the accelerator's.
        owners: those that step these parameters.
    """

    def __init__(
        self,
        passed: Sequence[Tensor],
        optimizers: Sequence[AcceleratedOptimizer],
        prepared: _PreparedClipper,
        selected: Mapping[int, Tensor],
        owners: Sequence[_OwningOptimizer],
    ) -> None:
        self.prepared, self.selected, self.owners = prepared, selected, owners
        modules = {id(m): m for model in prepared.modules for m in model.modules()}.values()
        # the modules' parameters and children
        self._tables = [table for m in modules for table in (m._parameters, m._modules)]
        self._objects = self._list_objects(passed, optimizers)

    def is_repeated(
        self, passed: Sequence[Tensor], optimizers: Sequence[AcceleratedOptimizer]
    ) -> bool:
        """Whether the next clip is of the same objects."""
        now = self._list_objects(passed, optimizers)
        return len(now) == len(self._objects) and all(map(is_, now, self._objects))

    def _list_objects(
        self, passed: Sequence[Tensor], optimizers: Sequence[AcceleratedOptimizer]
    ) -> list[Any]:
        objects: list[Any] = [*passed, None]
        for optimizer in optimizers:
            objects.append(optimizer)
            for group in optimizer.param_groups:
                objects += group["params"]
        objects.extend(chain.from_iterable(map(dict.values, self._tables)))
        return objects


class _AcceleratorScope(ClippingScope[_PreparedClipper]):
    """What stands behind an accelerator's clipping methods."""

    def __init__(self, accelerator: Any) -> None:
        super().__init__()
        self.accelerator = accelerator
        self.parts = OrderedDict[_PartKey, GradClipper]()
        # by the identity of the first parameter that is passed
        self.whole_clips: dict[int, _WholeClip] = {}
        self.warned_unstepped = False  # that some of the parameters are in no optimizer
        self._accelerate_free_memory = accelerator.free_memory
        accelerator.clip_grad_norm_ = self.clip_grad_norm_
        accelerator.clip_grad_value_ = self.clip_grad_value_
        accelerator.free_memory = self.free_memory

    @classmethod
    def scope_of(cls, accelerator: Accelerator) -> _AcceleratorScope | None:
        """The accelerator's scope, or None before `prepare`."""
        return cls.behind(accelerator.clip_grad_norm_)

    def give_back(self) -> None:
        """Restore Accelerate's own methods."""
        for name in ("clip_grad_norm_", "clip_grad_value_", "free_memory"):
            delattr(self.accelerator, name)

    def add_prepared(self, new: _PreparedClipper) -> None:
        """Add `new`; it replaces those that have parameters of the same models."""
        mine = new.params_by_id()
        self.forget_prepared(
            [old for old in self.prepared if not mine.keys().isdisjoint(old.params_by_id())]
        )
        self.prepared.append(new)
        self.accelerator.register_for_checkpointing(new.clipper)

    def forget_prepared(self, gone: Sequence[_PreparedClipper]) -> None:
        clippers = {id(prepared.clipper) for prepared in gone}
        self.prepared = [
            prepared for prepared in self.prepared if id(prepared.clipper) not in clippers
        ]
        objects: list[Any] = self.accelerator._custom_objects
        objects[:] = [thing for thing in objects if id(thing) not in clippers]
        self.parts.clear()
        self.whole_clips.clear()

    def free_memory(self, *objects: Any) -> Any:
        """Accelerate drops its models and optimizers, and distclip its clippers."""
        self.forget_prepared(self.prepared)
        return self._accelerate_free_memory(*objects)

    def clip_grad_norm_(
        self, parameters: Iterable[Tensor] | Tensor, max_norm: float | None, norm_type: float = 2
    ) -> Tensor:
        passed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if not self.accelerator.sync_gradients:
            return torch.full((), math.nan, device=self.accelerator.device)
        last = self.whole_clips.pop(id(passed[0]), None) if passed else None
        if last is not None and last.is_repeated(passed, self.accelerator._optimizers):
            self.whole_clips[id(passed[0])] = last
            prepared = last.prepared
            prepared.accepts_norm(max_norm, float(norm_type), whole=True)
            return self._clip_grads(last.selected, last.owners, (), prepared.clipper).total_norm
        selected = _params_by_id(passed)
        for prepared in self.prepared if selected else ():
            others = prepared.rest_of_models(selected)
            if others is not None and prepared.accepts_norm(
                max_norm, float(norm_type), whole=not others
            ):
                return self._clip_whole(passed, selected, prepared, others).total_norm
        self._refuse_under_deepspeed("parts of a model")
        if max_norm is None:
            raise ConfigError(
                "max_norm=None: parts of a model, and several together, have no "
                "policy of their own; pass a number"
            )
        return self._clip_part(selected, "norm", float(max_norm), float(norm_type)).total_norm

    def clip_grad_value_(self, parameters: Iterable[Tensor] | Tensor, clip_value: float) -> None:
        selected = _params_by_id(parameters)
        self._refuse_under_deepspeed("elements, by value,")
        if self.accelerator.sync_gradients:
            self._clip_part(selected, "value", float(clip_value), 2.0)

    def _refuse_under_deepspeed(self, what: str) -> None:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ConfigError(
                f"under DeepSpeed accelerator.backward() already takes the step, so {what} cannot "
                "be clipped after it; tell prepare: prepare(accelerator, model, "
                "policy=distclip.FixedValue(...)), or groups=distclip.by_name({...})"
            )

    def _clip_whole(
        self,
        passed: list[Tensor],
        selected: dict[int, Tensor],
        prepared: _PreparedClipper,
        others: Sequence[Tensor],
    ) -> ClipReport:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            if prepared.clipper.last_report is None:
                raise ConfigError(
                    "no step was taken yet; under DeepSpeed accelerator.backward() "
                    "clips and steps: call it first"
                )
            return prepared.clipper.last_report
        owners = self._owning_optimizers(selected)
        report = self._clip_grads(selected, owners, others, prepared.clipper)
        self._warn_unstepped(selected, owners, prepared.modules)
        every = set[int]().union(*(owner.held for owner in owners))
        if not others and selected.keys() <= every:
            optimizers = self.accelerator._optimizers
            if len(self.whole_clips) >= _MOST_PARTS:  # passed in another order at each step
                self.whole_clips.clear()
            known = _WholeClip(passed, optimizers, prepared, selected, owners)
            self.whole_clips[id(passed[0])] = known
        return report

    def _clip_part(
        self, selected: Mapping[int, Tensor], rule: str, bound: float, norm_type: float
    ) -> ClipReport:
        prepared = self._prepared_with(selected)
        models = tuple({id(model): model for p in prepared for model in p.modules}.values())
        owners = self._owning_optimizers(selected)
        key = _PartKey(
            models=tuple(map(id, models)),
            optimizers=tuple(owner.position for owner in owners),
            rule=rule,
            bound=bound,
            norm_type=norm_type,
        )
        if key not in self.parts:
            options = prepared[0].options_without("groups", "norm_type", "sinks")
            how: dict[str, Any] = (
                {"max_norm": bound} if rule == "norm" else {"policy": FixedValue(bound)}
            )
            self.parts[key] = GradClipper(models, norm_type=norm_type, **how, **options)
            if len(self.parts) > _MOST_PARTS:
                self.parts.popitem(last=False)
        self.parts.move_to_end(key)
        others = [param for param in params_of(models) if id(param) not in selected]
        report = self._clip_grads(selected, owners, others, self.parts[key])
        self._warn_unstepped(selected, owners, models)
        return report

    def _prepared_with(self, selected: Mapping[int, Tensor]) -> list[_PreparedClipper]:
        """Those whose models have parameters in `selected`. On a rank that passes none: the only
        one, if there is only one."""
        if not selected and len(self.prepared) == 1:
            return self.prepared
        known = [(p, p.params_by_id().keys()) for p in self.prepared]
        num_unknown = len(selected.keys() - set[int]().union(*(own for _, own in known)))
        if num_unknown:
            raise ConfigError(
                f"{num_unknown} of {len(selected)} parameters are of no model that distclip knows; "
                "call distclip.integrations.accelerate.prepare(accelerator, model, max_norm=...) "
                "for that model too"
            )
        if not selected:
            raise ConfigError(
                "no parameters were passed (a generator that was used up?), and distclip knows "
                f"{len(known)} sets of models here; pass model.parameters() anew at each call, and "
                "call prepare(accelerator, model, max_norm=...) before"
            )
        return [p for p, own in known if not own.isdisjoint(selected)]

    def _owning_optimizers(self, selected: Mapping[int, Tensor]) -> list[_OwningOptimizer]:
        """The optimizers that hold any of these parameters."""
        every = enumerate(self.accelerator._optimizers)
        return [
            _OwningOptimizer(k, o, held)
            for k, o in every
            if not selected.keys().isdisjoint(held := stepped_by(o))
        ]

    def _clip_grads(
        self,
        selected: Mapping[int, Tensor],
        owners: Sequence[_OwningOptimizer],
        others: Sequence[Tensor],
        clipper: GradClipper,
    ) -> ClipReport:
        """One all-reduce."""
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.is_enabled():
            self._unscale_rests(scaler, selected, owners)
        optimizers = [owner.optimizer for owner in owners]
        report, others_had_grad = self.clip_without(others, clipper, optimizers, scaler)
        if others_had_grad and bool(report.skipped):  # a step is skipped as a whole
            for param in (p for owner in owners for p in owner.held.values()):
                param.grad = None
        return report

    def _unscale_rests(
        self, scaler: Any, selected: Mapping[int, Tensor], owners: Sequence[_OwningOptimizer]
    ) -> None:
        """The scaler unscales an optimizer as a whole: what it holds beside the clipped parameters
        must be unscaled too."""
        if not owners:
            raise ConfigError(
                "no optimizer that accelerator.prepare was given holds these "
                "parameters, so they cannot be unscaled"
            )
        if self.deferred_update is None and len(self.accelerator._optimizers) > 1:
            self.deferred_update = DeferredScalerUpdate(scaler)
        for owner in owners:
            if not owner.held.keys() <= selected.keys():
                unscale_once(scaler, owner.optimizer.optimizer)

    def _warn_unstepped(
        self,
        selected: Mapping[int, Tensor],
        owners: Sequence[_OwningOptimizer],
        models: Iterable[nn.Module],
    ) -> None:
        """Warn once: the parameters that are passed count in the norm, and a gradient that no
        optimizer steps or zeroes grows from step to step."""
        held = set[int]().union(*(owner.held for owner in owners))
        if not owners or self.warned_unstepped or selected.keys() <= held:
            return
        named = (pair for model in models for pair in model.named_parameters())
        left = [
            name
            for name, p in named
            if id(p) in selected and id(p) not in held and p.grad is not None
        ]
        if left:
            self.warned_unstepped = True
            warnings.warn(
                f"{left[0]} has a gradient and was passed to be clipped, but is in no optimizer of "
                f"this accelerator ({len(left)} such parameters): it counts in the norm, and "
                "optimizer.zero_grad() does not clear it. Give it to an optimizer, or freeze it "
                "and set its .grad to None, or pass the other parameters alone",
                RuntimeWarning,
                stacklevel=4,
            )


def _params_by_id(parameters: Iterable[Tensor] | Tensor) -> dict[int, Tensor]:
    """Each parameter once, by its id."""
    every = [parameters] if isinstance(parameters, Tensor) else parameters
    return {id(param): param for param in every}
