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
        row
        for strategy in ("ddp", "fsdp2")
        for count in ((10,) if effort.quick else (10, 100))
        for row in loop("accelerate", strategy, count, effort, kernels)
    ]


def deepspeed(effort: Effort, kernels: str) -> list[Row]:
    return loop("deepspeed", "zero2", 10 if effort.quick else 100, effort, kernels)


def loop(framework: str, strategy: str, count: int, effort: Effort, kernels: str) -> list[Row]:
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
    command += [framework, strategy, str(count), *(["--quick"] if effort.quick else [])]
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
    return [
        row
        for state, found in answers.items()
        for row in rows_of(framework, strategy, state, found, kernels)
    ]


def rows_of(
    framework: str, strategy: str, state: str, found: dict[str, Any], kernels: str
) -> list[Row]:
    wall, message = found["wall"], Spread.of(found["message"])
    peer, *all_ours = wall
    sent = f"the message of {found['words']} words alone: {1e3 * message.median:.2f} ms"
    what = f"{strategy}, {found['parameters']} parameters, {state}"
    rows: list[Row] = []
    for ours in all_ours:
        floor, note = 1.0, sent
        if strategy == "ddp" and ours is all_ours[0]:
            floor, note = None, f"{sent}; the peer sends nothing here"
        rows.append(
            Row(
                framework, what, ratios(wall, peer, ours), "x", ours, peer, Spread.of(wall[peer]), Spread.of(wall[ours]),
                floor, kernels=kernels, ranks=RANKS, main=ours is all_ours[0], note=note,
            )
        )  # fmt: skip
    return rows
