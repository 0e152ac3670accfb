"""Hugging Face Trainer: distclip clips by `max_grad_norm`, and the log shows what clipping did.

    trainer = Trainer(model, TrainingArguments(max_grad_norm=1.0, ...), ...)
    clip_with_distclip(trainer)  # the only new line
    trainer.train()

Written against transformers 5.23 and accelerate 1.15.
"""

from __future__ import annotations

import base64
import io
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from distclip import ConfigError, GradClipper, Policy
from distclip.integrations import raise_missing_extra

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import ExportableState
except ModuleNotFoundError as error:
    raise_missing_extra(error, "transformers")
try:
    from distclip.integrations.accelerate import prepare, release, set_expected_max_norm
except ModuleNotFoundError as error:
    raise_missing_extra(error, "transformers", "accelerate")


def clip_with_distclip(
    trainer: Trainer, *, policy: Policy | None = None, **options: Any
) -> DistclipCallback:
    """Let distclip clip the gradients from the next `trainer.train()` on: one process, DDP, FSDP1,
    FSDP2 and DeepSpeed.

    The threshold is `TrainingArguments.max_grad_norm`; 0 only measures, as in Trainer. With
    `policy` the policy decides, and `max_grad_norm` only has to be positive. Beside `grad_norm` the
    training log gets the latest `clip_coef` (the smallest, where there are groups), `clip_rate`
    (the share of steps since the last log that were clipped) and `clip_skipped` (how many were
    skipped).

    The clipper's state is saved in each checkpoint's `trainer_state.json`, wherever Trainer writes
    that, and loaded from the one that Trainer resumes from. If that one has no such state, or that
    of another step, a RuntimeWarning says so and the clipper starts afresh; it never loads another
    run's. Each `train()` builds a clipper, which starts afresh unless the training is resumed.

    Args:
        options: those of `GradClipper`.

    Returns:
        The callback; its `clipper` is None until training begins.

    Raises:
        ConfigError: a policy together with `max_grad_norm=0`, by which Trainer would not clip at
            all; a trainer that this function was called for before.
    """
    if any(
        isinstance(callback, DistclipCallback) for callback in trainer.callback_handler.callbacks
    ):
        raise ConfigError(
            "this trainer is clipped by distclip already; call clip_with_distclip once"
        )
    if policy is not None and not trainer.args.max_grad_norm > 0:
        raise ConfigError(
            f"max_grad_norm={trainer.args.max_grad_norm} tells Trainer not to clip; "
            f"leave it at 1.0 when a policy is passed"
        )
    callback = DistclipCallback(trainer, policy, options)
    trainer.add_callback(callback)
    trainer.remove_callback(DistclipState)  # left by a DistclipCallback that was removed
    trainer.add_callback(DistclipState())
    return callback


class DistclipCallback(TrainerCallback):
    """Builds the clipper when training begins, and adds its reports to the log. Created by
    `clip_with_distclip`."""

    def __init__(self, trainer: Trainer, policy: Policy | None, options: dict[str, Any]) -> None:
        self.trainer, self.policy, self.options = trainer, policy, options
        self.clipper: GradClipper | None = None
        self._num_steps = 0
        self._clipped_and_skipped: Tensor | None = (
            None  # [2]: steps clipped and skipped since the last log
        )
        self._trainer_log = trainer.log
        trainer.log = self._log_with_clipping

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        norm = float(args.max_grad_norm) if args.max_grad_norm > 0 else math.inf
        model: Any = trainer.model_wrapped
        self.clipper = prepare(
            trainer.accelerator,
            model,
            max_norm=norm if self.policy is None else None,
            policy=self.policy,
            **self.options,
        )
        set_expected_max_norm(trainer.accelerator, self.clipper, norm)
        self._num_steps, self._clipped_and_skipped = 0, None
        # for parameters on several meshes Trainer has a norm of its own, which bypasses distclip
        if hasattr(trainer, "_mixed_mesh_grads"):
            trainer._mixed_mesh_grads = False
        saving = [
            callback
            for callback in trainer.callback_handler.callbacks
            if isinstance(callback, DistclipState)
        ]
        if len(saving) != 1:
            raise ConfigError(
                f"this trainer has {len(saving)} DistclipState callbacks; leave the "
                f"one that clip_with_distclip added"
            )
        saving[0].begin(self.clipper, state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        report = None if self.clipper is None else self.clipper.last_report
        if report is None:
            return
        did = torch.stack([report.clipped, report.skipped]).long()
        self._clipped_and_skipped = (
            did if self._clipped_and_skipped is None else self._clipped_and_skipped + did
        )
        self._num_steps += 1

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore Accelerate's own methods: a later `train()` without this callback is not clipped
        by distclip."""
        if self.clipper is not None:
            release(self.trainer.accelerator, self.clipper)

    def _log_with_clipping(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        report = None if self.clipper is None else self.clipper.last_report
        if report is not None and self._clipped_and_skipped is not None and "grad_norm" in logs:
            clipped, skipped = self._clipped_and_skipped.tolist()
            logs |= {
                "clip_coef": float(report.coefs.min()),
                "clip_rate": clipped / self._num_steps,
                "clip_skipped": skipped,
            }
            self._num_steps, self._clipped_and_skipped = 0, None
        self._trainer_log(logs, *args, **kwargs)


class DistclipState(TrainerCallback, ExportableState):
    """The clipper's state in `trainer_state.json`: Trainer calls `state()` when it writes the file,
    and passes the saved state to `begin` when it resumes.

    It takes no arguments, since Trainer may replace it by a new instance when it resumes.
    """

    def __init__(self) -> None:
        self.clipper: GradClipper | None = None
        self.step = 0  # Trainer's
        self._training: Any = None  # Trainer's state object, a new one in each train()

    def begin(self, clipper: GradClipper, state: Any) -> None:
        """Begin training; `state` is Trainer's, new or of the checkpoint that it resumes from."""
        self.clipper, self.step, self._training = clipper, state.global_step, state
        if state.global_step:
            self._load_or_warn(
                clipper, state.stateful_callbacks.get(type(self).__name__), state.global_step
            )
        state.stateful_callbacks[type(self).__name__] = self.state()

    def _load_or_warn(self, clipper: GradClipper, kept: Any, step: int) -> None:
        found = kept.get("attributes", {}) if isinstance(kept, dict) else {}
        if found.get("record") and found.get("step") == step:
            clipper.load_state_dict(_decode_state(found["record"]))
            return
        what = f"that of step {found['step']}" if found.get("record") else "none"
        warnings.warn(
            f"the checkpoint of step {step} that training resumes from should hold the state of "
            f"distclip's clipper in its trainer_state.json, and holds {what}: adaptive thresholds "
            "and counters begin anew",
            RuntimeWarning,
            stacklevel=2,
        )

    def state(self) -> dict[str, Any]:
        """What Trainer writes into its JSON. No collective: the clipper's state is the same on
        every rank."""
        record = None if self.clipper is None else _encode_state(self.clipper.state_dict())
        return {"args": {}, "attributes": {"step": self.step, "record": record}}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state is not self._training:  # the callback that clips was removed
            self.clipper = None
        self.step = state.global_step
        if control.should_save:
            self.keep(args, state)

    def keep(self, args: Any, state: Any) -> None:
        """For code that writes `trainer_state.json` by itself: Trainer calls `state()` only for
        checkpoints of its own."""
        if args.should_save and state is self._training:
            state.stateful_callbacks[type(self).__name__] = self.state()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.keep(args, state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:
            self.keep(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.keep(args, state)


def _encode_state(state: dict[str, Any]) -> str:
    """The state as text, without loss."""
    file = io.BytesIO()
    torch.save(state, file)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _decode_state(text: str) -> dict[str, Any]:
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True, map_location="cpu")
