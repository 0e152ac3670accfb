"""Hugging Face Trainer: `max_grad_norm` goes through distclip, and the log tells what clipping did.

    trainer = Trainer(model, TrainingArguments(max_grad_norm=1.0, ...), ...)
    clip_with_distclip(trainer)  # the one line
    trainer.train()

Written against transformers 5.23 and accelerate 1.15.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from distclip import ConfigError, GradClipper, Policy
from distclip.integrations.accelerate import expect, prepare

_FILE = "distclip.pt"


def clip_with_distclip(trainer: Trainer, *, policy: Policy | None = None, **options: Any) -> DistclipCallback:
    """From the next `trainer.train()` on, its gradients are clipped by distclip: one process, DDP, FSDP1, FSDP2 and DeepSpeed.

    The threshold is `TrainingArguments.max_grad_norm`; 0 only measures, as in Trainer. With `policy` it is the policy that decides, and
    `max_grad_norm` only has to be positive. The training log gets, beside `grad_norm`, the latest `clip_coef` (the smallest, where there
    are groups), `clip_rate` (the share of steps since the last log that were clipped) and `clip_skipped` (how many were skipped).
    The clipper's state is saved with each checkpoint and resumed with it.

    Args:
        options: of `GradClipper`.

    Returns:
        The callback; its `clipper` is there once training began.

    Raises:
        ConfigError: a policy together with `max_grad_norm=0`, which would tell Trainer not to clip; a trainer that was given one before.
    """
    if any(isinstance(callback, DistclipCallback) for callback in trainer.callback_handler.callbacks):
        raise ConfigError("this trainer is clipped by distclip already; call clip_with_distclip once")
    if policy is not None and not trainer.args.max_grad_norm > 0:
        raise ConfigError(f"max_grad_norm={trainer.args.max_grad_norm} tells Trainer not to clip; leave it at 1.0 when a policy is passed")
    callback = DistclipCallback(trainer, policy, options)
    trainer.add_callback(callback)
    return callback


class DistclipCallback(TrainerCallback):
    """Builds the clipper when training begins, and tells its reports to the log. Made by `clip_with_distclip`."""

    def __init__(self, trainer: Trainer, policy: Policy | None, options: dict[str, Any]) -> None:
        self.trainer, self.policy, self.options = trainer, policy, options
        self.clipper: GradClipper | None = None
        self._steps = 0
        self._clipped: Tensor | None = None  # [2]: steps clipped and skipped since the last log
        self._own_log = trainer.log
        trainer.log = self._log

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        norm = float(args.max_grad_norm) if args.max_grad_norm > 0 else math.inf
        model: Any = trainer.model_wrapped
        self.clipper = prepare(
            trainer.accelerator, model, max_norm=norm if self.policy is None else None, policy=self.policy, **self.options
        )
        expect(trainer.accelerator, self.clipper, norm)
        # Trainer has a norm of its own for parameters on several meshes, which would pass distclip by
        if hasattr(trainer, "_mixed_mesh_grads"):
            trainer._mixed_mesh_grads = False
        if state.global_step:
            self._resume(Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        report = None if self.clipper is None else self.clipper.last_report
        if report is None:
            return
        did = torch.stack([report.clipped, report.skipped]).long()
        self._clipped = did if self._clipped is None else self._clipped + did
        self._steps += 1

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.clipper is not None and state.is_world_process_zero and folder.is_dir():
            torch.save(self.clipper.state_dict(), folder / _FILE)

    def _resume(self, file: Path) -> None:
        if self.clipper is None:
            return
        if file.is_file():
            self.clipper.load_state_dict(torch.load(file, weights_only=True))
        else:
            warnings.warn(f"{file} was not found: adaptive thresholds start anew", RuntimeWarning, stacklevel=2)

    def _log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        report = None if self.clipper is None else self.clipper.last_report
        if report is not None and self._clipped is not None and "grad_norm" in logs:
            clipped, skipped = self._clipped.tolist()
            logs |= {"clip_coef": float(report.coefs.min()), "clip_rate": clipped / self._steps, "clip_skipped": skipped}
            self._steps, self._clipped = 0, None
        self._own_log(logs, *args, **kwargs)
