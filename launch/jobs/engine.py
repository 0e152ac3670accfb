"""DeepSpeed: the engine owns gradients and step, and distclip decides inside `engine.step()`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import distclip
from clipping import options, rule
from config import Config
from jobs.job import Job, make_optimizer, spoil_backward
from models import make_model
from refusal import Refused
from strategies.spread import LOW, every_rank, loss_of

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator

from distclip.integrations.deepspeed import attach

if not torch.cuda.is_available():
    # its C++ build takes minutes, and gloo does
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Engine(Job):
    def __init__(self, config: Config, device: str) -> None:
        self.config, self.part = config, every_rank()
        table = engine_table(config, self.part[1])
        model = make_model(config.model, config.training.seed).to(device)
        try:
            self.model, *_ = deepspeed.initialize(
                model=model, optimizer=make_optimizer(model, config), config=table
            )
            self.clipper = attach(self.model, policy=rule(config.clip), **options(config))
        except distclip.ConfigError as error:
            raise Refused(f"deepspeed={config.deepspeed!r}: {error}") from None
        self.optimizer = self.model.optimizer
        self.scaler = torch.amp.GradScaler(device, enabled=False)  # the engine scales by itself

    def step(
        self, x: Tensor, y: Tensor, fault: float | None
    ) -> tuple[Tensor | None, distclip.ClipReport]:
        total, steps, low = (
            torch.zeros((), device=x.device),
            self.config.training.accumulate,
            LOW.get(self.config.training.precision),
        )
        x = x.to(low) if x.is_floating_point() else x
        spoilt = None if fault is None else spoil_backward(self.model, fault)
        for part, target in zip(x.chunk(steps), y.chunk(steps), strict=True):
            loss = loss_of(self.model(part), target)
            self.model.backward(loss)  # divides by the micro-steps
            self.model.step()  # acts at the last of them
            total += loss.detach() / steps
        if spoilt is not None:
            spoilt.remove()
        report = self.clipper.last_report
        assert report is not None
        return total, report

    def save(self, folder: str, step: int) -> None:
        save_engine(self.model, self.clipper, folder, step)

    def resume(self, folder: str) -> int:
        return resume_engine(self.model, self.clipper, folder)


def engine_table(config: Config, world: int) -> dict[str, Any]:
    """DeepSpeed's own JSON. Refused where it and `training` say different things: neither is
    preferred in silence."""
    try:
        table: dict[str, Any] = json.loads(Path(config.deepspeed).read_text())
    except OSError:
        raise Refused(
            f"deepspeed={config.deepspeed!r} is no file; strategy: deepspeed needs DeepSpeed's "
            f"JSON, and configs/deepspeed/ holds some"
        ) from None
    except ValueError as error:
        raise Refused(f"deepspeed={config.deepspeed!r} is no JSON: {error}") from None
    training = config.training
    low = next((name for name in LOW if table.get(name, {}).get("enabled")), "fp32")
    told = {
        "train_micro_batch_size_per_gpu": training.batch // world // training.accumulate,
        "gradient_accumulation_steps": training.accumulate,
    }
    for name, wanted in told.items():
        if table.get(name) != wanted:
            raise Refused(
                f"{config.deepspeed}: {name} is {table.get(name)}, but "
                f"training.batch={training.batch} on {world} ranks in "
                f"training.accumulate={training.accumulate} micro-steps makes it {wanted}; change "
                f"one of them"
            )
    if low != training.precision:
        raise Refused(
            f"{config.deepspeed} is for {low}, and training.precision is "
            f"{training.precision}; change one of them"
        )
    if low == "fp16" and not get_accelerator().is_fp16_supported():
        raise Refused(
            "training.precision=fp16: DeepSpeed runs it on GPUs only; use bf16 or fp32 here"
        )
    return table


def save_engine(engine: Any, clipper: distclip.GradClipper, folder: str, step: int) -> None:
    engine.save_checkpoint(
        folder, tag=f"step{step}", client_state={"step": step, "clipper": clipper.state_dict()}
    )


def resume_engine(engine: Any, clipper: distclip.GradClipper, folder: str) -> int:
    if not (Path(folder) / "latest").exists():
        return 0
    _, state = engine.load_checkpoint(folder)
    clipper.load_state_dict(state["clipper"])
    return int(state["step"])
