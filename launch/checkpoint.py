"""Checkpoints of a run: model, optimizer, clipper, scaler and step, by
torch.distributed.checkpoint."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import distclip
from refusal import Refused

# by parameter name, so that the stages of a pipeline, each with an optimizer of its own, make one
# checkpoint
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass
class Run:
    """What a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    clipper: distclip.GradClipper
    scaler: torch.amp.GradScaler

    def state(self, step: int) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=BY_NAME)
        scaler = {
            name: torch.tensor(value, dtype=torch.float64)
            for name, value in self.scaler.state_dict().items()
        }
        return {
            "model": model,
            "optimizer": optimizer,
            "clipper": self.clipper,
            "scaler": scaler,
            "step": torch.tensor(step),
        }


@contextmanager
def one_process_is_meant() -> Iterator[None]:
    """torch warns where there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def save(folder: str, step: int, run: Run) -> None:
    """Into a folder of its own; the one before is removed after it, so that a run that is killed
    while it saves loses nothing."""
    with one_process_is_meant():
        dcp.save(run.state(step), checkpoint_id=Path(folder) / f"step{step}")
    if not dist.is_initialized() or dist.get_rank() == 0:
        for other in Path(folder).glob("step*"):
            if other.name != f"step{step}":
                shutil.rmtree(other)


def resume(folder: str, run: Run) -> int:
    """The step to go on with: 0 where `folder` holds no whole checkpoint."""
    whole = [path.parent for path in Path(folder).glob("step*/.metadata")]  # written last
    if not whole:
        return 0
    state = run.state(0)
    try:
        newest = max(whole, key=lambda path: int(path.name[4:]))
        with one_process_is_meant():
            dcp.load(state, checkpoint_id=newest)
        set_state_dict(
            run.model,
            run.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=BY_NAME,
        )
    except (Exception, CheckpointException) as error:  # torch derives the latter from BaseException
        reason = str(error).strip().splitlines()[-1]
        raise Refused(
            f"output.checkpoint={folder!r} cannot be resumed from ({reason}); it was cut short, or "
            f"is of another model or clipper: move it "
            "away to start anew"
        ) from None
    if run.scaler.is_enabled():
        whole = ("growth_interval", "_growth_tracker")
        run.scaler.load_state_dict(
            {k: int(v) if k in whole else float(v) for k, v in state["scaler"].items()}
        )
    return int(state["step"])
