"""Stages 1 to 3: each rank steps its own part of the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distclip import ClipReport, GradClipper
from distclip.integrations.deepspeed_internals.engine import (
    EngineAdapter,
    ParamPart,
    never_overflows,
)


def _flat_norm(report: ClipReport) -> Tensor:
    """The norm that DeepSpeed's step sees: inf at a step to be skipped, else 1, as it checks only
    whether the norm is finite."""
    return (
        report.total_norm.new_full((), float("inf"))
        if bool(report.on_host().skipped)
        else torch.ones_like(report.total_norm)
    )


def _autocast_unsupported(optimizer: Any) -> list[str]:
    return (
        ["torch_autocast with a gradient scaler; use DeepSpeed's fp16 or bf16"]
        if optimizer.torch_autocast_gradscaler is not None
        else []
    )


class ZeRO12Adapter(EngineAdapter):
    """Stages 1 and 2: each rank steps a contiguous part of every param group, laid out flat."""

    needed_names = (
        "averaged_gradients",
        "params_in_partition",
        "single_partition_of_fp32_groups",
        "partition_size",
        "grad_start_offset",
        "grad_partition_insertion_offset",
        "real_dp_process_group",
        "get_param_id",
        "cpu_offload",
        "loss_scale",
        "check_grad_overflow",
        "check_overflow",
        "scaled_global_norm",
        "unscale_and_clip_grads",
        "_update_scale",
        "compute_grad_norm",
        "torch_autocast_gradscaler",
    )

    @classmethod
    def unsupported_features(cls, optimizer: Any) -> list[str]:
        without = (
            ['"zero_optimization": {"compute_grad_norm": false}; leave that out']
            if not optimizer.compute_grad_norm
            else []
        )
        return [*without, *_autocast_unsupported(optimizer)]

    def find_parts(self) -> Iterator[ParamPart]:
        o = self.optimizer
        for i, params in enumerate(o.params_in_partition):
            rank = dist.get_rank(o.real_dp_process_group[i])
            for param in params:
                key = o.get_param_id(param)
                start = int(o.grad_partition_insertion_offset[i][rank][key])
                count = min(
                    param.numel() - int(o.grad_start_offset[i][rank][key]),
                    int(o.partition_size[i]) - start,
                )
                yield self.flat_part(
                    param, i, i, o.single_partition_of_fp32_groups[i], start, count
                )

    def install(self, clipper: GradClipper) -> None:
        super().install(clipper)
        # overflow shows in the norm, by one collective instead of two
        self.replace_method("check_overflow", never_overflows)
        self.replace_method("scaled_global_norm", self.measure_norm)
        self.replace_method("unscale_and_clip_grads", self.apply_clip)
        self._own_checks = self.optimizer.check_grad_overflow

    def measure_norm(self, norm_type: float = 2) -> Tensor:
        o = self.optimizer
        for i, flat in enumerate(o.single_partition_of_fp32_groups):
            if o.cpu_offload:
                if flat.grad is not None:
                    self.assign_slices(i, flat.grad)
                continue
            grads = [
                g
                for g in o.averaged_gradients.get(i) or ()
                if not getattr(g, "_zero_padding", False)
            ]
            mine = [part for part in self.parts if part.flat == i]
            self._grads |= {id(part.master): grad.reshape(-1) for part, grad in zip(mine, grads)}
        report = self.decide_step(float(o.loss_scale))
        # with bf16 the optimizer ignores a norm that is not finite unless it checks for overflow
        o.check_grad_overflow = bool(report.on_host().skipped) or self._own_checks
        return _flat_norm(report)

    def apply_clip(self, grad_groups_flat: Sequence[Tensor], total_norm: Any) -> None:
        for grad in grad_groups_flat:
            i = next(
                i
                for i, flat in enumerate(self.optimizer.single_partition_of_fp32_groups)
                if flat.grad is grad
            )
            self.clipper.apply_([part.master for part in self.assign_slices(i, grad)])

    def take_step(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.own_step(*args, **kwargs)
        finally:
            self.optimizer.check_grad_overflow = self._own_checks


class ZeRO3Adapter(EngineAdapter):
    """Stage 3: each rank steps a slice of every parameter; those of a sub-group lie in one flat
    buffer."""

    needed_names = (
        "averaged_gradients",
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "sub_group_to_group_id",
        "offload_optimizer",
        "loss_scale",
        "check_overflow",
        "_get_norm_groups",
        "unscale_and_clip_grads",
        "_update_scale",
        "swap_optimizer",
        "torch_autocast_gradscaler",
    )

    @classmethod
    def unsupported_features(cls, optimizer: Any) -> list[str]:
        return [
            *(
                ["an optimizer swapped to NVMe; offload it to the CPU"]
                if optimizer.swap_optimizer
                else []
            ),
            *_autocast_unsupported(optimizer),
        ]

    def find_parts(self) -> Iterator[ParamPart]:
        o = self.optimizer
        for i, params in enumerate(o.fp16_groups):
            start = 0
            for param in params:
                count = int(param.partition_numel())
                yield self.flat_part(
                    param,
                    int(o.sub_group_to_group_id[i]),
                    i,
                    o.fp32_partitioned_groups_flat[i],
                    start,
                    count,
                )
                start += count

    def install(self, clipper: GradClipper) -> None:
        super().install(clipper)
        self.replace_method("check_overflow", never_overflows)
        self.replace_method("_get_norm_groups", self.measure_norms)
        self.replace_method("unscale_and_clip_grads", self.apply_clip)

    def measure_norms(self) -> list[Tensor]:
        o = self.optimizer
        for i, flat in enumerate(o.fp32_partitioned_groups_flat):
            if o.offload_optimizer:
                if flat.grad is not None:
                    self.assign_slices(i, flat.grad)
                continue
            mine = [part for part in self.parts if part.flat == i]
            self._grads |= {
                id(part.master): grad.reshape(-1)
                for part, grad in zip(mine, o.averaged_gradients.get(i) or ())
            }
        return [_flat_norm(self.decide_step(float(o.loss_scale)))]

    def apply_clip(self, sub_group_id: int, total_norm: Any) -> None:
        grad = self.optimizer.fp32_partitioned_groups_flat[sub_group_id].grad
        self.clipper.apply_([part.master for part in self.assign_slices(sub_group_id, grad)])


class BF16Adapter(EngineAdapter):
    """Stage 1 in bf16 with float32 accumulation: gradients are accumulated in flat float32
    buffers."""

    needed_names = (
        "bf16_groups",
        "fp32_groups_flat_partition",
        "fp32_groups_gradient_flat_partition",
        "real_dp_process_group",
        "clear_hp_grads",
        "clear_lp_grads",
    )

    def find_parts(self) -> Iterator[ParamPart]:
        o = self.optimizer
        for i, params in enumerate(o.bf16_groups):
            flat = o.fp32_groups_flat_partition[i]
            low = dist.get_rank(o.real_dp_process_group[i]) * flat.numel()
            at = 0
            for param in params:
                start, end = max(at - low, 0), min(at + param.numel() - low, flat.numel())
                if start < end:
                    yield self.flat_part(param, i, i, flat, start, end - start)
                at += param.numel()

    def take_step(self, *args: Any, **kwargs: Any) -> Any:
        o = self.optimizer
        for i, grad in enumerate(o.fp32_groups_gradient_flat_partition):
            self.assign_slices(i, grad)
        if bool(self.decide_step().skipped):
            o.overflow = True
            o.clear_hp_grads()
            o.clear_lp_grads()
            return None
        self.clipper.apply_([part.master for part in self.parts])
        return self.own_step(*args, **kwargs)
