"""What a clip costs here. Measured and shown, but no reason to fail: a busy node is no fault."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip.cli.doctor.records import CheckContext, CheckResult, Observation

SMALL_WORDS, LARGE_WORDS = 16, 1 << 19  # float64: a clip's message with one group, and 4 MiB
LAYERS, LAYER_SIZE = 12, 1024  # 12 × (1024 × 1024 + 1024) float32: 50 MB of gradients
TIMED_RUNS = 7
GRAD_VALUE = 1e-3  # of every gradient element


def _time_call(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class LatencyCheck:
    """The message of a clip, and one 32,768 times as large."""

    name: str = "latency"
    line: str = "median time of an all-reduce of a clip's message, and of 4 MiB"

    def unmet_requirement(self, size: int) -> str:
        return "" if size > 1 else "needs at least 2 ranks; there is 1"

    def run(self, context: CheckContext) -> Observation:
        found: Observation = {}
        for words, runs in ((SMALL_WORDS, 50), (LARGE_WORDS, 10)):
            context.begin_stage("measure", f"all_reduce of {words} float64")
            message = torch.zeros(words, dtype=torch.float64, device=context.device)
            times = [
                _time_call(partial(dist.all_reduce, message), context.device)
                for _ in range(runs + 3)
            ]
            found[str(words)] = median(times[3:])
        return found

    def judge(self, observations: Sequence[Observation]) -> CheckResult:
        parts = [
            f"{words} float64: {max(one[words] for one in observations) * 1e3:.2f} ms"
            for words in (str(SMALL_WORDS), str(LARGE_WORDS))
        ]
        return CheckResult(
            self.name, "measured", f"all_reduce of {', of '.join(parts)}; the slowest rank's median"
        )


@dataclass(frozen=True, slots=True)
class SpeedCheck:
    """`clip_` and torch's clip_grad_norm_ on the same plain gradients, by turns.

    torch sends nothing for these: distclip's time without the all-reduce is compared with it, and
    its time with the all-reduce is shown apart.
    """

    name: str = "speed"
    line: str = (
        "median time of clip_ and of torch's clip_grad_norm_, by turns, when nothing is to be "
        "clipped and when all is"
    )

    def unmet_requirement(self, size: int) -> str:
        return ""

    def run(self, context: CheckContext) -> Observation:
        model = nn.Sequential(*(nn.Linear(LAYER_SIZE, LAYER_SIZE) for _ in range(LAYERS))).to(
            context.device
        )
        params = list(model.parameters())
        for param in params:
            param.grad = torch.empty_like(param)
        grads = [param.grad for param in params if param.grad is not None]
        norm = math.sqrt(sum(grad.numel() for grad in grads)) * GRAD_VALUE
        found: Observation = {
            "megabytes": sum(grad.numel() * grad.element_size() for grad in grads) / 1e6
        }
        for case, threshold in (("idle", norm * 1e3), ("active", norm / 2)):
            context.begin_stage(f"GradClipper set-up, {case}", "all_reduce")
            clipper = distclip.GradClipper(model, threshold)
            alone = distclip.GradClipper(model, threshold, process_group=distclip.LOCAL)
            context.begin_stage(f"clip_, {case}", f"all_reduce of {clipper.plan.words} float64")
            calls = {
                "all": clipper.clip_,
                "alone": alone.clip_,
                "torch": partial(nn.utils.clip_grad_norm_, params, threshold),
            }
            times: dict[str, list[float]] = {who: [] for who in calls}
            for _ in range(TIMED_RUNS + 1):
                for who, call in calls.items():
                    for grad in grads:
                        grad.fill_(GRAD_VALUE)
                    times[who].append(_time_call(call, context.device))
            found[case] = {who: median(spent[1:]) for who, spent in times.items()}
        return found

    def judge(self, observations: Sequence[Observation]) -> CheckResult:
        def worst(case: str, who: str) -> float:
            return max(one[case][who] for one in observations) * 1e3

        cases = {"idle": "nothing to clip", "active": "clipped"}
        parts = [
            f"{what} {worst(case, 'alone'):.1f} ms, torch {worst(case, 'torch'):.1f} ms"
            for case, what in cases.items()
        ]
        seconds = f"{observations[0]['megabytes']:.0f} MB on each rank: {'; '.join(parts)}"
        if len(observations) > 1:
            whole = " and ".join(f"{worst(case, 'all'):.1f} ms" for case in cases)
            seconds += (
                ". This is the work on one rank: torch's function sends nothing here. With the "
                f"all_reduce of a clip {whole}"
            )
        return CheckResult(self.name, "measured", seconds)
