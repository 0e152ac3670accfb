"""What a log says of the run before its first step, so that it can be read alone."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import torch

from distclip.policies.policy import shown
from distclip.setup.options import ClipOptions
from distclip.setup.plan import Plan

SCHEMA = 2  # of the log; lines without a header are of schema 1

# Variables that a launcher alone sets, the outer one first: Accelerate starts torchrun's agent, and
# torchrun may be started by srun.
_LAUNCHERS = (
    ("accelerate", ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "ACCELERATE_CONFIG_DS_FIELDS")),
    ("deepspeed", ("CROSS_RANK",)),
    ("torchrun", ("TORCHELASTIC_RUN_ID",)),
    ("slurm", ("SLURM_PROCID",)),
)


def make_header(plan: Plan, options: ClipOptions, device: torch.device) -> dict[str, Any]:
    """Plain Python numbers, lists and strings. Sends nothing."""
    return {
        "distclip_log": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "run": None,
        "policy": shown(options.policy),
        "groups": list(plan.groups),
        "norm_type": plan.norm_type,
        "world_size": len(plan.ranks),
        "on_nonfinite": options.on_nonfinite,
        "layers": list(plan.layers),
        "plan": [{**asdict(row), "ranks": list(row.ranks)} for row in plan.rows],
        "versions": {
            "distclip": sys.modules["distclip"].__version__,  # it stands above this file
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "launcher": launcher(),
        "device": device.type,
    }


def launcher() -> str:
    """By what this process was started: `accelerate`, `deepspeed`, `torchrun`, `slurm`, or `python`
    where none of them left its mark in the environment."""
    for name, marks in _LAUNCHERS:
        if any(mark in os.environ for mark in marks):
            return name
    return "python"
