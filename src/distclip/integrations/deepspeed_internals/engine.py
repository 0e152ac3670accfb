"""What all kinds of DeepSpeed engine share.

Each kind of DeepSpeed optimizer reduces and partitions gradients during backward. Its `step` then
measures a norm, updates the loss scale, and multiplies float32 copies of the gradients by clip
coefficient and inverse scale. The first and the last are replaced here; the loss scale is read
before its update, since gradients are scaled by that of their backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from types import MethodType
from typing import Any, ClassVar

from torch import Tensor

from distclip import ClipReport, ConfigError, GradClipper

NEEDED_OF_ENGINE = (
    "module",
    "optimizer",
    "basic_optimizer",
    "mpu",
    "has_moe_layers",
    "pipeline_parallelism",
    "torch_autocast_z0_gradscaler",
    "fp16_enabled",
    "dynamic_loss_scale",
    "gradient_clipping",
    "_config.gradient_clipping",
    "skipped_steps",
    "get_global_grad_norm",
)

_OWN_CLIPPING = (
    'leave attach out and let DeepSpeed clip ("gradient_clipping": 1.0 in its config), or train '
    "such a model under FSDP2 with its experts, stages or tensor-parallel parts as torch has "
    "them, where GradClipper(model, ...) knows them"
)


def missing_names(holder: Any, names: Sequence[str]) -> list[str]:
    """Those of the dotted names that `holder` does not have, each with its class's name."""
    lost: list[str] = []
    for name in names:
        try:
            attrgetter(name)(holder)
        except AttributeError:
            lost.append(f"{type(holder).__name__}.{name}")
    return lost


def unsupported_features(engine: Any) -> list[str]:
    """Features of this engine, of any kind, under which distclip cannot clip, each with what to use
    instead."""
    muon = "muon" in type(engine.basic_optimizer).__name__.lower()
    autocast = "torch_autocast with a gradient scaler; use DeepSpeed's fp16 or bf16"
    found = {
        f"a model-parallel mpu; {_OWN_CLIPPING}": engine.mpu is not None,
        f"DeepSpeed's mixture-of-experts layers; {_OWN_CLIPPING}": engine.has_moe_layers,
        f"pipeline parallelism; {_OWN_CLIPPING}": engine.pipeline_parallelism,
        autocast: engine.torch_autocast_z0_gradscaler is not None,
        "Muon with fp16; use bf16": engine.fp16_enabled() and muon,
    }
    return [what for what, has in found.items() if has]


def own_clipping(engine: Any) -> float:
    return float(engine.gradient_clipping())


def end_own_clipping(engine: Any) -> None:
    engine._config.gradient_clipping = 0.0
    if hasattr(engine.optimizer, "clip_grad"):  # only DeepSpeed's own optimizers have it
        engine.optimizer.clip_grad = 0.0


@dataclass(frozen=True, eq=False, slots=True)
class ParamPart:
    """The part of one parameter that this rank steps."""

    name: str
    param: Tensor  # the model's
    group: int  # its param group
    flat: int  # its index among DeepSpeed's flat buffers
    start: int  # in the flat buffer
    master: Tensor  # float32, usually a view of the flat buffer


class EngineAdapter:
    """One attached engine."""

    needed_names: ClassVar[tuple[str, ...]] = ()  # attributes of the optimizer
    sharded: ClassVar[bool] = True  # whether ranks hold different parts

    def __init__(self, engine: Any) -> None:
        self.engine, self.optimizer = engine, engine.optimizer
        self._names = {id(param): name for name, param in engine.module.named_parameters()}
        self.parts: list[ParamPart] = list(self.find_parts())
        self._grads: dict[int, Tensor] = {}  # id of a master → its gradient now
        self._policy_skip = False
        self.clipper: GradClipper

    @classmethod
    def unsupported_features(cls, optimizer: Any) -> list[str]:
        """Features of this optimizer under which distclip cannot clip."""
        return []

    def find_parts(self) -> Iterator[ParamPart]:
        raise NotImplementedError

    def install(self, clipper: GradClipper) -> None:
        self.clipper = clipper
        if hasattr(self.optimizer, "_update_scale"):
            self.replace_method("_update_scale", self._update_scale)
        self.replace_method("step", self._step_and_publish_norm)

    def grad_of(self, master: Tensor) -> Tensor | None:
        return self._grads.get(id(master))

    @contextmanager
    def original_param_groups(self) -> Generator[None]:
        """Within this context param groups hold the model's parameters, in place of DeepSpeed's
        flat buffers or empty lists."""
        groups = self.optimizer.param_groups
        saved = [group["params"] for group in groups]
        try:
            for i, group in enumerate(groups):
                group["params"] = [part.param for part in self.parts if part.group == i]
            yield
        finally:
            for group, params in zip(groups, saved, strict=True):
                group["params"] = params

    def flat_part(
        self, param: Tensor, group: int, flat: int, buffer: Tensor, start: int, count: int
    ) -> ParamPart:
        return ParamPart(
            self.param_name(param),
            param,
            group,
            flat,
            start,
            buffer.detach().narrow(0, start, count),
        )

    def param_name(self, param: Tensor) -> str:
        if id(param) not in self._names:
            raise ConfigError(
                f"the engine's optimizer steps a parameter of shape {tuple(param.shape)} that is "
                "not in the model; put it into the model that deepspeed.initialize gets"
            )
        return self._names[id(param)]

    def assign_slices(self, flat: int, grad: Tensor) -> list[ParamPart]:
        """The parts of one flat buffer; their gradients become slices of `grad`."""
        mine = [part for part in self.parts if part.flat == flat]
        self._grads |= {
            id(part.master): grad.narrow(0, part.start, part.master.numel()) for part in mine
        }
        return mine

    def decide_step(self, scale: float = 1.0) -> ClipReport:
        dynamic = bool(self.engine.fp16_enabled() and self.engine.dynamic_loss_scale())
        report = self.clipper.decide(1 / scale, dynamic_loss_scale=dynamic)
        self._policy_skip = (
            bool(report.skipped)
            and not int(report.nonfinite)
            and bool(report.total_norm.isfinite())
        )
        return report

    def replace_method(self, name: str, new: Callable[..., Any]) -> None:
        """Replace a method of the optimizer by `new`; its own is kept as `own_<name>`."""

        def instead(_: Any, *args: Any, **kwargs: Any) -> Any:
            return new(*args, **kwargs)

        setattr(self, f"own_{name}", getattr(self.optimizer, name))
        # bound to the optimizer: a learning-rate scheduler takes the function of `optimizer.step`
        # and binds it again
        setattr(self.optimizer, name, MethodType(instead, self.optimizer))

    def _update_scale(self, *args: Any, **kwargs: Any) -> None:
        """A step that a policy skips is no overflow."""
        given, named = ((False,), {}) if self._policy_skip else (args, kwargs)
        self.own__update_scale(*given, **named)  # pyright: ignore[reportAttributeAccessIssue]

    def _step_and_publish_norm(self, *args: Any, **kwargs: Any) -> Any:
        before = self.clipper.last_report
        try:
            return self.take_step(*args, **kwargs)
        finally:
            self._policy_skip = False
            self._grads.clear()
            report = self.clipper.last_report
            if report is not None and report is not before:
                # inf for a step that is not finite, as in DeepSpeed
                norm = float(report.total_norm)
                self.optimizer._global_grad_norm = (
                    math.inf if int(report.nonfinite) or math.isnan(norm) else norm
                )

    def take_step(self, *args: Any, **kwargs: Any) -> Any:
        return self.own_step(*args, **kwargs)

    own_step: Callable[..., Any]


def never_overflows(*args: Any, **kwargs: Any) -> bool:
    """Replaces DeepSpeed's checks for overflow."""
    return False
