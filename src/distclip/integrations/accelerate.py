"""Hugging Face Accelerate: the loop keeps its lines, `accelerator.clip_grad_norm_` goes through distclip.

    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    clipper = prepare(accelerator, model, max_norm=1.0)
    ...
    accelerator.clip_grad_norm_(model.parameters(), 1.0)  # as before

Written against accelerate 1.15; of its private names `_optimizers` is used, and checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

from distclip import ClipReport, ConfigError, FixedValue, GradClipper, Policy
from distclip.integrations.scaler_rounds import LaterUpdate

_HERE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP, DistributedType.DEEPSPEED)


def prepare(
    accelerator: Accelerator, *models: nn.Module, max_norm: float | None = None, policy: Policy | None = None, **options: Any
) -> GradClipper:
    """A clipper for `models`, which `accelerator.clip_grad_norm_` and `clip_grad_value_` use from now on. A collective.

    Call it after `accelerator.prepare`, once for each model (or set of models) that is clipped by a norm of its own. Its state goes
    with `accelerator.save_state` and `load_state`.

    Afterwards, on every rank alike:

    * `clip_grad_norm_(parameters, max_norm, norm_type)` takes a model's parameters, a part of them, or those of several models, and
      returns the global norm before clipping, a plain 0-dim tensor; of the part only. For whole models `max_norm` and `norm_type` must be
      those given here (None under a `policy`): two thresholds for one model are a mistake.
    * `clip_grad_value_(parameters, clip_value)` works on sharded models too.
    * Only the optimizers that hold the given parameters are unscaled. With several optimizers the scaler is updated once a round, when
      the next loss is scaled, and not after each optimizer's step, by which Accelerate unscales the others twice.
    * On a micro-step of gradient accumulation nothing is done or sent, and the answer is NaN.
    * A step that is not finite is skipped on all ranks: the gradients of the optimizers concerned are None, `optimizer.step()` moves
      nothing.

    Under DeepSpeed `accelerator.backward()` already takes the step, so distclip decides there, in place of the engine's own clipping
    (see `distclip.integrations.deepspeed.attach`); `clip_grad_norm_` then tells that step's norm. Clipping by value or parts of the model
    is refused: use `policy=` and `groups=`.

    Args:
        options: of `GradClipper`; under DeepSpeed of `attach`.

    Raises:
        ConfigError: no model, an option that cannot be honoured, or a framework under which Accelerate does not own the step.
    """
    if not models:
        raise ConfigError("prepare(accelerator, model, max_norm=...) needs the model that accelerator.prepare returned")
    if "grad_of" in options:
        raise ConfigError(
            "prepare(accelerator, ..., grad_of=): Accelerate steps what is in .grad; use GradClipper itself for other gradients"
        )
    if accelerator.distributed_type not in _HERE:
        raise ConfigError(f"accelerate's distributed type {accelerator.distributed_type.value} is not supported")
    if not hasattr(accelerator, "_optimizers"):
        raise ConfigError("this version of accelerate keeps its optimizers elsewhere; distclip was written against accelerate 1.15")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        clipper = _attached(models, max_norm, policy, options)
    else:
        clipper = GradClipper(list(models), max_norm, policy=policy, **options)
    now = getattr(accelerator.clip_grad_norm_, "__self__", None)
    clipping = now if isinstance(now, _Clipping) else _Clipping(accelerator)
    clipping.prepared = [p for p in clipping.prepared if _identity(_params(p.models)).isdisjoint(_identity(_params(models)))]
    clipping.prepared.append(_Prepared(clipper, models, max_norm, float(options.get("norm_type", 2.0)), options))
    accelerator.clip_grad_norm_ = clipping.clip_grad_norm_
    accelerator.clip_grad_value_ = clipping.clip_grad_value_
    accelerator.register_for_checkpointing(clipper)
    return clipper


def expect(accelerator: Accelerator, clipper: GradClipper, max_norm: float) -> None:
    """`clip_grad_norm_` of this clipper's models is called with `max_norm`, whatever the clipper was built with."""
    clipping = getattr(accelerator.clip_grad_norm_, "__self__", None)
    assert isinstance(clipping, _Clipping), "prepare comes first"
    for prepared in clipping.prepared:
        if prepared.clipper is clipper:
            prepared.max_norm = max_norm


def _attached(models: Sequence[Any], max_norm: float | None, policy: Policy | None, options: dict[str, Any]) -> GradClipper:
    from distclip.integrations.deepspeed import attach

    if len(models) != 1:
        raise ConfigError(f"prepare got {len(models)} models; under DeepSpeed call it once for each engine")
    return attach(models[0], max_norm, policy=policy, take_over=True, **options)


@dataclass
class _Prepared:
    clipper: GradClipper
    models: tuple[nn.Module, ...]
    max_norm: float | None
    norm_type: float
    options: dict[str, Any]


@dataclass(eq=False)
class _Clipping:
    """What stands behind an accelerator's clipping methods."""

    accelerator: Accelerator
    prepared: list[_Prepared] = field(default_factory=list)
    made: dict[tuple[frozenset[int], str], tuple[float, float, GradClipper]] = field(default_factory=dict)  # for parts and values
    later: LaterUpdate | None = None

    def clip_grad_norm_(self, parameters: Iterable[Tensor] | Tensor, max_norm: float | None, norm_type: float = 2) -> Tensor:
        params = _listed(parameters)
        if not self.accelerator.sync_gradients:
            return torch.full((), math.nan, device=self.accelerator.device)
        prepared = next((p for p in self.prepared if _identity(_trainable(p.models)) == _identity(params)), None)
        if prepared is None:
            self._refuse_under_deepspeed("parts of a model")
            if max_norm is None:
                raise ConfigError("max_norm=None: parts of a model, and several together, have no policy of their own; pass a number")
            return self._clip(params, self._of(params, "norm", float(max_norm), float(norm_type)), part=True).total_norm
        if max_norm != prepared.max_norm or float(norm_type) != prepared.norm_type:
            raise ConfigError(
                f"clip_grad_norm_ was called with max_norm={max_norm}, norm_type={norm_type}, but distclip was prepared with "
                f"max_norm={prepared.max_norm}, norm_type={prepared.norm_type:g} for this model; make them equal"
                + (" (under a policy max_norm is None)" if prepared.max_norm is None else "")
            )
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            if prepared.clipper.last_report is None:
                raise ConfigError("no step was taken yet; under DeepSpeed accelerator.backward() clips and steps: call it first")
            return prepared.clipper.last_report.total_norm
        return self._clip(params, prepared.clipper).total_norm

    def clip_grad_value_(self, parameters: Iterable[Tensor] | Tensor, clip_value: float) -> None:
        params = _listed(parameters)
        self._refuse_under_deepspeed("elements, by value,")
        if self.accelerator.sync_gradients:
            self._clip(params, self._of(params, "value", float(clip_value), 2.0), part=True)

    def _refuse_under_deepspeed(self, what: str) -> None:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ConfigError(
                f"under DeepSpeed accelerator.backward() already takes the step, so {what} cannot be clipped after it; tell prepare: "
                "prepare(accelerator, model, policy=distclip.FixedValue(...)), or groups=distclip.by_name({...})"
            )

    def _clip(self, params: Sequence[Tensor], clipper: GradClipper, part: bool = False) -> ClipReport:
        asked = {id(p) for p in params}
        every: list[Optimizer] = self.accelerator._optimizers
        owners = [o for o in every if any(id(p) in asked for group in o.param_groups for p in group["params"])]
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.is_enabled() and not owners:
            raise ConfigError("no optimizer that accelerator.prepare was given holds these parameters, so they cannot be unscaled")
        if scaler is not None and scaler.is_enabled() and self.later is None and len(every) > 1:
            self.later = LaterUpdate(scaler)
        with nullcontext() if self.later is None else self.later.clipping():
            report = clipper.clip_(owners, scaler)
        if part and bool(report.skipped):  # a step that is left out is left out whole
            for param in (p for o in owners for group in o.param_groups for p in group["params"]):
                param.grad = None
        return report

    def _of(self, params: Sequence[Tensor], kind: str, bound: float, norm_type: float) -> GradClipper:
        """A clipper for exactly these parameters; made at the first call, which is a collective, and anew for another bound."""
        asked = _identity(params)
        known = self.made.get((asked, kind))
        if known is not None and known[:2] == (bound, norm_type):
            return known[2]
        prepared = [p for p in self.prepared if asked & _identity(_params(p.models))]
        models = list({id(model): model for p in prepared for model in p.models}.values())
        strange = len(asked - _identity(_params(models)))
        if strange:
            raise ConfigError(
                f"{strange} of {len(asked)} parameters are of no model that distclip knows; "
                "call distclip.integrations.accelerate.prepare(accelerator, model, max_norm=...) for that model too"
            )
        options = {k: v for k, v in prepared[0].options.items() if k not in ("groups", "norm_type", "sinks")}
        rule: dict[str, Any] = {"max_norm": bound} if kind == "norm" else {"policy": FixedValue(bound)}
        clipper = GradClipper(models, grad_of=only(params), norm_type=norm_type, **rule, **options)
        self.made[asked, kind] = (bound, norm_type, clipper)
        return clipper


def only(params: Iterable[Tensor]) -> Callable[[Tensor], Tensor | None]:
    """A `grad_of` under which the other parameters have no gradient: they are neither clipped nor in the norm."""
    asked = _identity(params)
    return lambda param: param.grad if id(param) in asked else None


def _listed(parameters: Iterable[Tensor] | Tensor) -> list[Tensor]:
    return [p for p in ([parameters] if isinstance(parameters, Tensor) else parameters) if p.requires_grad]


def _trainable(models: Iterable[nn.Module]) -> list[Tensor]:
    return [p for p in _params(models) if p.requires_grad]


def _params(models: Iterable[nn.Module]) -> list[Tensor]:
    return [p for model in models for p in model.parameters()]


def _identity(params: Iterable[Tensor]) -> frozenset[int]:
    return frozenset(id(p) for p in params)
