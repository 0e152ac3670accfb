"""Stage 0: every rank steps all parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from distclip import GradClipper
from distclip.integrations.deepspeed_internals.engine import (
    EngineAdapter,
    ParamPart,
    never_overflows,
)


class WholeAdapter(EngineAdapter):
    """Stage 0 in fp16 or bf16: every rank steps float32 copies of all parameters.

    DeepSpeed 0.19 does not scale the loss of these optimizers, but divides their gradients by the
    loss scale. distclip does not divide them.
    """

    needed_names = (
        "fp16_groups",
        "unscale_and_clip_grads",
        "_skip_invalid_grad_norm",
        "_update_scale",
        "overflow_checker",
        "loss_scale_config",
    )
    sharded = False

    def take_step(self, *args: Any, **kwargs: Any) -> Any:
        self._grads |= {
            id(part.master): part.param.grad.reshape(part.master.shape)
            for part in self.parts
            if part.param.grad is not None
        }
        if bool(self.decide_step().skipped):
            return self.optimizer._skip_invalid_grad_norm()
        return self.own_step(*args, **kwargs)


class UnfusedAdapter(WholeAdapter):
    needed_names = (
        *WholeAdapter.needed_names,
        "fp32_groups",
        "overflow_checker.check",
        "fused_lamb_legacy",
    )

    @classmethod
    def unsupported_features(cls, optimizer: Any) -> list[str]:
        return (
            ["DeepSpeed's own Lamb; use another optimizer"] if optimizer.fused_lamb_legacy else []
        )

    def find_parts(self) -> Iterator[ParamPart]:
        for i, (params, masters) in enumerate(
            zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
        ):
            for param, master in zip(params, masters, strict=True):
                yield ParamPart(
                    name=self.param_name(param),
                    param=param,
                    group=i,
                    flat=i,
                    start=0,
                    master=master,
                )

    def install(self, clipper: GradClipper) -> None:
        super().install(clipper)
        self.replace(self.optimizer.overflow_checker, "check", never_overflows)
        self.replace_method("unscale_and_clip_grads", self.apply_clip)

    def apply_clip(self, total_norm: Any, apply_scale: bool = True) -> float:
        self._grads = {
            id(part.master): part.master.grad for part in self.parts if part.master.grad is not None
        }
        self.clipper.apply_([part.master for part in self.parts])
        return 1.0


class FusedAdapter(WholeAdapter):
    needed_names = (
        *WholeAdapter.needed_names,
        "fp32_groups_flat",
        "overflow_checker.has_overflow",
        "fused_adam_legacy",
    )

    @classmethod
    def unsupported_features(cls, optimizer: Any) -> list[str]:
        return (
            ['a legacy fused optimizer; take "legacy_fusion" out of its config']
            if optimizer.fused_adam_legacy
            else []
        )

    def find_parts(self) -> Iterator[ParamPart]:
        for i, (params, flat) in enumerate(
            zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups_flat, strict=True)
        ):
            start = 0
            for param in params:
                yield self.flat_part(param, i, i, flat, start, param.numel())
                start += param.numel()

    def install(self, clipper: GradClipper) -> None:
        super().install(clipper)
        self.replace(self.optimizer.overflow_checker, "has_overflow", never_overflows)
        self.replace_method("unscale_and_clip_grads", self.apply_clip)

    def apply_clip(
        self, grad_groups_flat: Sequence[Tensor], total_norm: Any, apply_scale: bool = True
    ) -> float:
        for i, grad in enumerate(grad_groups_flat):
            self.clipper.apply_([part.master for part in self.assign_slices(i, grad)])
        return 1.0


class PlainAdapter(EngineAdapter):
    """Stage 0 in float32: the user's own optimizer on the model's own parameters."""

    sharded = False

    def find_parts(self) -> Iterator[ParamPart]:
        for i, group in enumerate(self.optimizer.param_groups):
            for param in group["params"]:
                yield ParamPart(
                    name=self.param_name(param), param=param, group=i, flat=i, start=0, master=param
                )

    def grad_of(self, master: Tensor) -> Tensor | None:
        return master.grad

    def take_step(self, *args: Any, **kwargs: Any) -> Any:
        # by this attribute the engine counts a skipped step
        self.optimizer.overflow = bool(self.decide_step().skipped)
        if self.optimizer.overflow:
            self.optimizer.zero_grad(set_to_none=True)
            return None
        self.clipper.apply_([part.master for part in self.parts])
        return self.own_step(*args, **kwargs)
