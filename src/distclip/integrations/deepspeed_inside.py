"""Where DeepSpeed keeps gradients, and where its step lets a clipper in: all of its private names stand here.

Each kind of DeepSpeed optimizer reduces and partitions gradients during backward. Its `step` then measures a norm, moves the loss
scale, and multiplies float32 copies of the gradients by clip and inverse scale. The first and the last are replaced here; the loss
scale is read before it moves, since gradients carry the one of their backward.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from distclip import ClipReport, GradClipper


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """What this rank steps of one parameter."""

    name: str
    param: Tensor  # the model's
    group: int  # its param group
    flat: int  # its place among DeepSpeed's flat buffers
    start: int  # in the flat buffer
    master: Tensor  # float32, as a rule a view of the flat buffer


class Inside:
    """One attached engine."""

    needs: ClassVar[tuple[str, ...]] = ()  # of the optimizer
    sharded: ClassVar[bool] = True  # parts of different ranks are different data

    def __init__(self, engine: Any) -> None:
        self.engine, self.optimizer = engine, engine.optimizer
        self.names = {id(param): name for name, param in engine.module.named_parameters()}
        self.parts: list[Part] = list(self.found_parts())
        self._grads: dict[int, Tensor] = {}  # id of a master → its gradient now
        self._spike = False
        self.clipper: GradClipper

    @classmethod
    def missing(cls, engine: Any) -> list[str]:
        lost: list[str] = []
        for name in cls.needs:
            try:
                attrgetter(name)(engine.optimizer)
            except AttributeError:
                lost.append(f"{type(engine.optimizer).__name__}.{name}")
        return lost

    def found_parts(self) -> Iterator[Part]:
        raise NotImplementedError

    def install(self, clipper: GradClipper) -> None:
        self.clipper = clipper
        if hasattr(self.optimizer, "_update_scale"):
            self._replace("_update_scale", self._update_scale)
        self._replace("step", self._step)

    def grad_of(self, master: Tensor) -> Tensor | None:
        return self._grads.get(id(master))

    @contextmanager
    def original_param_groups(self) -> Generator[None]:
        """Param groups hold the model's parameters again; DeepSpeed leaves flat buffers there, or nothing."""
        groups = self.optimizer.param_groups
        saved = [group["params"] for group in groups]
        try:
            for i, group in enumerate(groups):
                group["params"] = [part.param for part in self.parts if part.group == i]
            yield
        finally:
            for group, params in zip(groups, saved, strict=True):
                group["params"] = params

    def part(self, param: Tensor, group: int, flat: int, buffer: Tensor, start: int, count: int) -> Part:
        return Part(self.names[id(param)], param, group, flat, start, buffer.detach().narrow(0, start, count))

    def slices(self, flat: int, grad: Tensor) -> list[Part]:
        """The parts of one flat buffer; their gradients are from now on those of `grad`."""
        mine = [part for part in self.parts if part.flat == flat]
        self._grads |= {id(part.master): grad.narrow(0, part.start, part.master.numel()) for part in mine}
        return mine

    def decide(self, scale: float = 1.0) -> ClipReport:
        dynamic = bool(self.engine.fp16_enabled() and self.engine.dynamic_loss_scale())
        report = self.clipper.decide(1 / scale, rescaled=dynamic)
        self._spike = bool(report.skipped) and not int(report.nonfinite) and bool(report.total_norm.isfinite())
        return report

    def _replace(self, name: str, new: Callable[..., Any]) -> None:
        setattr(self, f"own_{name}", getattr(self.optimizer, name))
        setattr(self.optimizer, name, new)

    def _update_scale(self, *args: Any, **kwargs: Any) -> None:
        """A spike that a policy leaves out is no overflow."""
        getattr(self, "own__update_scale")(*((False,) if self._spike else args), **({} if self._spike else kwargs))  # noqa: B009

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        before = self.clipper.last_report
        try:
            return self.take_step(*args, **kwargs)
        finally:
            self._spike = False
            self._grads.clear()
            report = self.clipper.last_report
            if report is not None and report is not before:
                self.optimizer._global_grad_norm = float(report.total_norm)

    def take_step(self, *args: Any, **kwargs: Any) -> Any:
        return self.own_step(*args, **kwargs)

    own_step: Callable[..., Any]


def _unasked(*args: Any, **kwargs: Any) -> bool:
    """In place of DeepSpeed's checks for overflow."""
    return False


def _flat_norm(report: ClipReport) -> Tensor:
    """What DeepSpeed's step takes for its norm: it goes on where it is finite, whatever it is."""
    return report.total_norm.new_full((), float("inf")) if bool(report.skipped) else torch.ones_like(report.total_norm)


class ZeRO12(Inside):
    """Stages 1 and 2: each rank steps a contiguous part of every param group, laid out flat."""

    needs = (
        "averaged_gradients", "params_in_partition", "single_partition_of_fp32_groups", "partition_size", "grad_start_offset",
        "grad_partition_insertion_offset", "real_dp_process_group", "get_param_id", "cpu_offload", "loss_scale", "check_grad_overflow",
        "check_overflow", "scaled_global_norm", "unscale_and_clip_grads", "_update_scale",
    )  # fmt: skip

    def found_parts(self) -> Iterator[Part]:
        o = self.optimizer
        for i, params in enumerate(o.params_in_partition):
            rank = dist.get_rank(o.real_dp_process_group[i])
            for param in params:
                key = o.get_param_id(param)
                start = int(o.grad_partition_insertion_offset[i][rank][key])
                count = min(param.numel() - int(o.grad_start_offset[i][rank][key]), int(o.partition_size[i]) - start)
                yield self.part(param, i, i, o.single_partition_of_fp32_groups[i], start, count)

    def install(self, clipper: GradClipper) -> None:
        super().install(clipper)
        self._replace("check_overflow", _unasked)  # the norm tells, by one message instead of two
        self._replace("scaled_global_norm", self.norm)
        self._replace("unscale_and_clip_grads", self.clip)
        self._checks = self.optimizer.check_grad_overflow

    def norm(self, norm_type: float = 2) -> Tensor:
        o = self.optimizer
        for i, flat in enumerate(o.single_partition_of_fp32_groups):
            if o.cpu_offload:
                if flat.grad is not None:
                    self.slices(i, flat.grad)
                continue
            grads = [g for g in o.averaged_gradients.get(i) or () if not getattr(g, "_zero_padding", False)]
            mine = [part for part in self.parts if part.flat == i]
            self._grads |= {id(part.master): grad.reshape(-1) for part, grad in zip(mine, grads)}
        report = self.decide(float(o.loss_scale))
        # bf16 ignores a norm that is not finite unless it checks for overflow
        o.check_grad_overflow = bool(report.skipped) or self._checks
        return _flat_norm(report)

    def clip(self, grad_groups_flat: Sequence[Tensor], total_norm: Any) -> None:
        for grad in grad_groups_flat:
            i = next(i for i, flat in enumerate(self.optimizer.single_partition_of_fp32_groups) if flat.grad is grad)
            self.clipper.apply_([part.master for part in self.slices(i, grad)])

    def take_step(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.own_step(*args, **kwargs)
        finally:
            self.optimizer.check_grad_overflow = self._checks


class ZeRO3(Inside):
    """Stage 3: each rank steps a slice of every parameter, sub-groups of them laid out flat."""

    needs = (
        "averaged_gradients", "fp16_groups", "fp32_partitioned_groups_flat", "sub_group_to_group_id", "offload_optimizer", "loss_scale",
        "check_overflow", "_get_norm_groups", "unscale_and_clip_grads", "_update_scale",
    )  # fmt: skip

    def found_parts(self) -> Iterator[Part]:
        o = self.optimizer
        for i, params in enumerate(o.fp16_groups):
            start = 0
            for param in params:
                count = int(param.partition_numel())
                yield self.part(param, int(o.sub_group_to_group_id[i]), i, o.fp32_partitioned_groups_flat[i], start, count)
                start += count

    def install(self, clipper: GradClipper) -> None:
        super().install(clipper)
        self._replace("check_overflow", _unasked)
        self._replace("_get_norm_groups", self.norms)
        self._replace("unscale_and_clip_grads", self.clip)

    def norms(self) -> list[Tensor]:
        o = self.optimizer
        for i, flat in enumerate(o.fp32_partitioned_groups_flat):
            if o.offload_optimizer:
                if flat.grad is not None:
                    self.slices(i, flat.grad)
                continue
            mine = [part for part in self.parts if part.flat == i]
            self._grads |= {id(part.master): grad.reshape(-1) for part, grad in zip(mine, o.averaged_gradients.get(i) or ())}
        return [_flat_norm(self.decide(float(o.loss_scale)))]

    def clip(self, sub_group_id: int, total_norm: Any) -> None:
        grad = self.optimizer.fp32_partitioned_groups_flat[sub_group_id].grad
        self.clipper.apply_([part.master for part in self.slices(sub_group_id, grad)])


class BF16(Inside):
    """Stage 1 in bf16 with float32 accumulation: gradients are float32 and flat from the first."""

    needs = (
        "bf16_groups", "fp32_groups_flat_partition", "fp32_groups_gradient_flat_partition", "real_dp_process_group", "clear_hp_grads",
        "clear_lp_grads",
    )  # fmt: skip

    def found_parts(self) -> Iterator[Part]:
        o = self.optimizer
        for i, params in enumerate(o.bf16_groups):
            flat = o.fp32_groups_flat_partition[i]
            low = dist.get_rank(o.real_dp_process_group[i]) * flat.numel()
            at = 0
            for param in params:
                start, end = max(at - low, 0), min(at + param.numel() - low, flat.numel())
                if start < end:
                    yield self.part(param, i, i, flat, start, end - start)
                at += param.numel()

    def take_step(self, *args: Any, **kwargs: Any) -> Any:
        o = self.optimizer
        for i, grad in enumerate(o.fp32_groups_gradient_flat_partition):
            self.slices(i, grad)
        if bool(self.decide().skipped):
            o.overflow = True
            o.clear_hp_grads()
            o.clear_lp_grads()
            return None
        self.clipper.apply_([part.master for part in self.parts])
        return self.own_step(*args, **kwargs)


class Whole(Inside):
    """Stage 0 in fp16 or bf16: every rank steps float32 copies of all parameters.

    DeepSpeed 0.19 does not scale the loss of these optimizers, and yet divides their gradients by the loss scale. Here they are not.
    """

    needs = ("fp16_groups", "unscale_and_clip_grads", "_skip_invalid_grad_norm", "_update_scale", "overflow_checker", "loss_scale_config")
    sharded = False

    def take_step(self, *args: Any, **kwargs: Any) -> Any:
        self._grads |= {id(part.master): part.param.grad.reshape(part.master.shape) for part in self.parts if part.param.grad is not None}
        if bool(self.decide().skipped):
            return self.optimizer._skip_invalid_grad_norm()
        return self.own_step(*args, **kwargs)


class Unfused(Whole):
    needs = (*Whole.needs, "fp32_groups", "overflow_checker.check")

    def found_parts(self) -> Iterator[Part]:
        for i, (params, masters) in enumerate(zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)):
            for param, master in zip(params, masters, strict=True):
                yield Part(self.names[id(param)], param, i, i, 0, master)

    def install(self, clipper: GradClipper) -> None:
        super().install(clipper)
        self.optimizer.overflow_checker.check = _unasked
        self._replace("unscale_and_clip_grads", self.clip)

    def clip(self, total_norm: Any, apply_scale: bool = True) -> float:
        self._grads = {id(part.master): part.master.grad for part in self.parts if part.master.grad is not None}
        self.clipper.apply_([part.master for part in self.parts])
        return 1.0


class Fused(Whole):
    needs = (*Whole.needs, "fp32_groups_flat", "overflow_checker.has_overflow")

    def found_parts(self) -> Iterator[Part]:
        for i, (params, flat) in enumerate(zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups_flat, strict=True)):
            start = 0
            for param in params:
                yield self.part(param, i, i, flat, start, param.numel())
                start += param.numel()

    def install(self, clipper: GradClipper) -> None:
        super().install(clipper)
        self.optimizer.overflow_checker.has_overflow = _unasked
        self._replace("unscale_and_clip_grads", self.clip)

    def clip(self, grad_groups_flat: Sequence[Tensor], total_norm: Any, apply_scale: bool = True) -> float:
        for i, grad in enumerate(grad_groups_flat):
            self.clipper.apply_([part.master for part in self.slices(i, grad)])
        return 1.0


class Plain(Inside):
    """Stage 0 in float32: the user's own optimizer on the model's own parameters."""

    sharded = False

    def found_parts(self) -> Iterator[Part]:
        for i, group in enumerate(self.optimizer.param_groups):
            for param in group["params"]:
                yield Part(self.names[id(param)], param, i, i, 0, param)

    def grad_of(self, master: Tensor) -> Tensor | None:
        return master.grad

    def take_step(self, *args: Any, **kwargs: Any) -> Any:
        self.optimizer.overflow = bool(self.decide().skipped)  # the engine counts a skipped step by it
        if self.optimizer.overflow:
            self.optimizer.zero_grad(set_to_none=True)
            return None
        self.clipper.apply_([part.master for part in self.parts])
        return self.own_step(*args, **kwargs)


KINDS: dict[str, type[Inside]] = {
    "DeepSpeedZeroOptimizer": ZeRO12,
    "DeepSpeedZeroOptimizer_Stage3": ZeRO3,
    "BF16_Optimizer": BF16,
    "FP16_UnfusedOptimizer": Unfused,
    "FP16_Optimizer": Fused,
    "plain": Plain,
}
