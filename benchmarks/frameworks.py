"""Accelerate and DeepSpeed: their own clipping against the same loop with distclip attached, under
torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.records import Row, Spread
from benchmarks.timing import Effort, ratios

RANKS = 2


def accelerate(effort: Effort, kernels: str) -> list[Row]:
    return [
        *loop("accelerate", "ddp", effort, kernels),
        *loop("accelerate", "fsdp2", effort, kernels),
    ]


def deepspeed(effort: Effort, kernels: str) -> list[Row]:
    return loop("deepspeed", "zero2", effort, kernels)


def loop(framework: str, strategy: str, effort: Effort, kernels: str) -> list[Row]:
    if find_spec(framework) is None:
        print(f"{framework} is not installed: left out", file=sys.stderr)
        return []
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(RANKS),
        "-m",
        "benchmarks.loops",
    ]
    command += [framework, strategy, *(["--quick"] if effort.quick else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    if done.returncode:
        raise SystemExit(
            f"benchmarks: {' '.join(command)} ended with "
            f"{done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    answers = json.JSONDecoder().raw_decode(done.stdout.split("RESULT ")[1])[0]
    return [row_of(framework, strategy, state, found, kernels) for state, found in answers.items()]


def row_of(framework: str, strategy: str, state: str, found: dict[str, Any], kernels: str) -> Row:
    wall, message = found["wall"], Spread.of(found["message"])
    (peer, ours), note = (
        wall,
        f"the message of {found['words']} words alone: {1e3 * message.median:.2f} ms",
    )
    floor = 1.0
    if strategy == "ddp":
        floor, note = None, f"{note}; the peer sends nothing here"
    return Row(
        framework, f"{strategy}, {found['parameters']} parameters, {state}", ratios(wall, peer, ours), "x", ours, peer,
        Spread.of(wall[peer]), Spread.of(wall[ours]), floor, kernels=kernels, ranks=RANKS, main=True, note=note,
    )  # fmt: skip
