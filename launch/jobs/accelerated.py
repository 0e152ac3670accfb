"""Accelerate: its loop, with distclip behind `accelerator.clip_grad_norm_`. How the model is spread
is Accelerate's own configuration."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor

import distclip
from checkpoint import Run, resume, save
from clipping import options, rule
from config import Config
from distclip.integrations.accelerate import prepare
from jobs.job import Job, make_optimizer, spoil, spoil_backward
from models import make_model
from refusal import Refused
from strategies.spread import every_rank, loss_of


class Accelerated(Job):
    def __init__(self, config: Config, device: str) -> None:
        training = config.training
        self.config, self.part = config, every_rank()
        if device == "cpu":
            stay_on_the_cpu(training.precision)
        self.accelerator = Accelerator(gradient_accumulation_steps=training.accumulate)
        self.by_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        agree(self.accelerator, config)
        if self.by_deepspeed:
            table = self.accelerator.state.deepspeed_plugin.deepspeed_config
            table["train_micro_batch_size_per_gpu"] = (
                training.batch // self.part[1] // training.accumulate
            )
        model = make_model(config.model, training.seed)
        self.model, self.prepared = self.accelerator.prepare(model, make_optimizer(model, config))
        try:
            self.clipper = prepare(
                self.accelerator, self.model, policy=rule(config.clip), **options(config)
            )
        except distclip.ConfigError as error:
            raise Refused(f"strategy: 'accelerate': {error}") from None
        self.optimizer = self.prepared.optimizer
        self.scaler = self.accelerator.scaler or torch.amp.GradScaler(device, enabled=False)

    def step(
        self, x: Tensor, y: Tensor, fault: float | None
    ) -> tuple[Tensor | None, distclip.ClipReport]:
        total, steps = torch.zeros((), device=x.device), self.config.training.accumulate
        spoilt = (
            spoil_backward(self.model, fault) if fault is not None and self.by_deepspeed else None
        )
        for part, target in zip(x.chunk(steps), y.chunk(steps), strict=True):
            with self.accelerator.accumulate(self.model):
                loss = loss_of(self.model(part), target)
                self.accelerator.backward(loss)
                if fault is not None and spoilt is None and self.accelerator.sync_gradients:
                    spoil(self.model, fault)
                # None: the policy given to `prepare` decides
                self.accelerator.clip_grad_norm_(self.model.parameters(), None)
                self.prepared.step()
                self.prepared.zero_grad()
            total += loss.detach() / steps
        if spoilt is not None:
            spoilt.remove()
        report = self.clipper.last_report
        assert report is not None
        return total, report

    def save(self, folder: str, step: int) -> None:
        if self.by_deepspeed:
            from jobs.engine import save_engine

            save_engine(self.model, self.clipper, folder, step)
        else:
            save(folder, step, Run(self.model, self.optimizer, self.clipper, self.scaler))

    def resume(self, folder: str) -> int:
        if self.by_deepspeed:
            from jobs.engine import resume_engine

            return resume_engine(self.model, self.clipper, folder)
        return resume(folder, Run(self.model, self.optimizer, self.clipper, self.scaler))


def stay_on_the_cpu(precision: str) -> None:
    """For trying out on a machine without GPUs what will run on some: Accelerate shards on
    accelerators only, so it is told that these ranks are such; it would otherwise ignore the FSDP
    part of its configuration in silence."""
    if precision == "fp16":
        raise Refused(
            "training.precision=fp16: Accelerate runs it on GPUs only; use bf16 or fp32 "
            "here, or strategy ddp or fsdp2"
        )
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        import jobs.engine  # noqa: F401 - it tells DeepSpeed the same
    PartialState(
        backend="gloo",
        cpu=not {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & os.environ.keys(),
    )
    if "ACCELERATE_USE_FSDP" in os.environ:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def agree(accelerator: Accelerator, config: Config) -> None:
    """Refused where Accelerate's configuration and `training` say different things."""
    training = config.training
    asked = {"fp32": "no"}.get(training.precision, training.precision)
    if accelerator.mixed_precision != asked:
        raise Refused(
            f"Accelerate's mixed_precision is {accelerator.mixed_precision}, and "
            f"training.precision is {training.precision}; change one of "
            "them (the file after launch/accelerate.sh, or --training.precision)"
        )
    if accelerator.gradient_accumulation_steps != training.accumulate:
        raise Refused(
            f"Accelerate's gradient_accumulation_steps is "
            f"{accelerator.gradient_accumulation_steps}, and training.accumulate is "
            f"{training.accumulate}; change one of them"
        )
