"""What all kinds of DeepSpeed engine share.

Each kind of DeepSpeed optimizer reduces and partitions gradients during backward. Its `step` then
measures a norm, updates the loss scale, and multiplies float32 copies of the gradients by clip
coefficient and inverse scale. The first and the last are replaced here; the loss scale is read
before its update, since gradients are scaled by that of their backward.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from types import MethodType
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor, nn

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
    "such a model under FSDP2 with its experts or tensor-parallel parts as torch has them, where "
    "GradClipper(model, ...) knows them"
)
_EXPERT_NAME = re.compile(r"deepspeed_experts\.(?P<number>\d+)\.")
_UNTIE = "untie them, or train in float32 or fp16 without ZeRO"


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
        f"a model-parallel mpu; {_OWN_CLIPPING}": _is_model_parallel(engine),
        f"experts that AutoEP made; {_OWN_CLIPPING}": _has_foreign_experts(engine.module),
        autocast: engine.torch_autocast_z0_gradscaler is not None,
        "Muon with fp16; use bf16": engine.fp16_enabled() and muon,
    }
    return [what for what, has in found.items() if has]


def _is_model_parallel(engine: Any) -> bool:
    """Whether layers are split over ranks. A pipeline's own mpu counts its stages as parts of the
    model; what splits layers is its slices."""
    if engine.mpu is None:
        return False
    return not engine.pipeline_parallelism or engine.mpu.get_slice_parallel_world_size() > 1


def _is_expert(param: Tensor) -> bool:
    """DeepSpeed marks parameters that not all data-parallel ranks share."""
    return not getattr(param, "allreduce", True)


def _has_foreign_experts(module: nn.Module) -> bool:
    """Whether some expert is not in DeepSpeed's `MoE` layer, so that its name does not say which of
    all experts it is."""
    return any(
        _is_expert(param) and _EXPERT_NAME.search(name) is None
        for name, param in module.named_parameters()
    )


def unsupported_sharded_features(engine: Any) -> list[str]:
    """As `unsupported_features`, for optimizers that split each stage's parameters over its ranks:
    copies of a tied parameter are split at different places."""
    tied = "layers tied over pipeline stages, with ZeRO or BF16_Optimizer"
    return [f"{tied}; {_UNTIE}"] if _has_tied_stages(engine) else []


def _has_tied_stages(engine: Any) -> bool:
    """The same on every rank, whichever stage it works on."""
    if not engine.pipeline_parallelism:
        return False
    stages: dict[Any, set[int]] = {}
    for at, layer in enumerate(engine.module._layer_specs):
        if type(layer).__name__ == "TiedLayerSpec":
            stages.setdefault(layer.key, set()).add(engine.module.stage_owner(at))
    return any(len(of_key) > 1 for of_key in stages.values())


def global_names(engine: Any) -> dict[int, str]:
    """By the id of each of the model's parameters: its name, where experts are numbered over all
    ranks, as in DeepSpeed's checkpoints. By these names copies of an expert are found."""
    local_experts = {
        name: int(module.num_local_experts)
        for name, module in engine.module.named_modules()
        if hasattr(module, "deepspeed_experts")
    }
    names: dict[int, str] = {}
    for name, param in engine.module.named_parameters():
        if _is_expert(param) and (found := _EXPERT_NAME.search(name)) is not None:
            group = engine.expert_parallel_group[param.group_name]
            first = dist.get_rank(group) * local_experts[name[: found.start() - 1]]
            number = first + int(found["number"])
            name = f"{name[: found.start('number')]}{number}{name[found.end('number') :]}"
        names[id(param)] = name
    return names


def own_clipping(engine: Any) -> float:
    return float(engine.gradient_clipping())


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
        self._names = global_names(engine)
        self.parts: list[ParamPart] = list(self.find_parts())
        self._grads: dict[int, Tensor] = {}  # id of a master → its gradient now
        self._policy_skip = False
        self._replaced: list[tuple[Any, str, bool, Any]] = []
        self.clipper: GradClipper

    @classmethod
    def unsupported_features(cls, optimizer: Any) -> list[str]:
        """Features of this optimizer under which distclip cannot clip."""
        return []

    def find_parts(self) -> Iterator[ParamPart]:
        raise NotImplementedError

    def install(self, clipper: GradClipper) -> None:
        self.clipper = clipper
        self.engine._distclip = self
        self.replace(self.engine._config, "gradient_clipping", 0.0)
        if hasattr(self.optimizer, "clip_grad"):  # only DeepSpeed's own optimizers have it
            self.replace(self.optimizer, "clip_grad", 0.0)
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
            name=self.param_name(param),
            param=param,
            group=group,
            flat=flat,
            start=start,
            master=buffer.detach().narrow(0, start, count),
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
        here = report.on_host()
        self._policy_skip = (
            bool(here.skipped) and not int(here.nonfinite) and bool(here.total_norm.isfinite())
        )
        return report

    def remove(self) -> None:
        """Everything is as before `install`."""
        for holder, name, was_its_own, before in reversed(self._replaced):
            if was_its_own:
                setattr(holder, name, before)
            else:
                delattr(holder, name)  # its class has it
        del self.engine._distclip

    def replace(self, holder: Any, name: str, new: Any) -> None:
        """Set an attribute until `remove`."""
        self._replaced.append((holder, name, name in vars(holder), getattr(holder, name)))
        setattr(holder, name, new)

    def replace_method(self, name: str, new: Callable[..., Any]) -> None:
        """Replace a method of the optimizer by `new`; its own is kept as `own_<name>`."""

        def instead(_: Any, *args: Any, **kwargs: Any) -> Any:
            return new(*args, **kwargs)

        setattr(self, f"own_{name}", getattr(self.optimizer, name))
        # bound to the optimizer: a learning-rate scheduler takes the function of `optimizer.step`
        # and binds it again
        self.replace(self.optimizer, name, MethodType(instead, self.optimizer))

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
                here = report.on_host()
                norm = float(here.total_norm)
                self.optimizer._global_grad_norm = (
                    math.inf if int(here.nonfinite) or math.isnan(norm) else norm
                )

    def take_step(self, *args: Any, **kwargs: Any) -> Any:
        return self.own_step(*args, **kwargs)

    own_step: Callable[..., Any]


def never_overflows(*args: Any, **kwargs: Any) -> bool:
    """Replaces DeepSpeed's checks for overflow."""
    return False
