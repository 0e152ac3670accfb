"""`distclip doctor --framework NAME`: the smallest training of that framework, with its own
clipping and with distclip's, beside float64."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

from distclip.cli.doctor.framework_jobs import (
    STEPS,
    TrainedModel,
    around_deepspeed,
    around_torchtitan,
    integration,
    params_of,
    problem,
    train_in_float64,
    train_with_accelerate,
    train_with_deepspeed,
    train_with_lightning,
    train_with_transformers,
)
from distclip.cli.doctor.megatron_job import around_megatron, train_with_megatron
from distclip.cli.doctor.output import DoctorOutput, as_json, as_table
from distclip.cli.doctor.records import CannotRun, CheckResult

# of a norm in float32, and of weights after the steps, relative to how far they moved: torch's own
# norm is off by 1e-4 on a CPU
NORM_BOUND, WEIGHT_BOUND, OWN_BOUND = 1e-5, 1e-5, 1e-3
LOSS_BOUND = 1e-5  # on a CPU they differ by 1e-7, and by 5e-4 where a threshold is twice as large


class FrameworkJob(NamedTuple):
    """`compared(name)` trains twice and judges, inside of `surroundings()`. `lacking()` says what
    this machine has not and what to do instead; an empty text where it has all."""

    compared: Callable[[str], list[CheckResult]]
    surroundings: Callable[[], AbstractContextManager[None]] = nullcontext
    lacking: Callable[[], str] = str  # which is an empty text


def run(options: argparse.Namespace) -> int:
    """In one process; the exit code of the table."""
    name: str = options.framework
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print("distclip doctor --framework: run it without torchrun", file=sys.stderr)
        return 2
    findings = DoctorOutput()
    try:
        findings.results = _results(name)
    except (CannotRun, ModuleNotFoundError, PackageNotFoundError) as error:
        findings.stopped = str(error)
    except Exception as error:
        traceback.print_exc()
        findings.stopped = f"{name}: {type(error).__name__}: {error}"
    print(as_json(findings) if options.json else as_table(findings), flush=True)
    return findings.exit_code


def _results(name: str) -> list[CheckResult]:
    job = JOBS[name]
    if lacking := job.lacking():
        raise CannotRun(lacking)
    # warnings and lines of the framework itself; standard output is for the results
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            integration(name)
            with job.surroundings():
                return job.compared(name)
        finally:
            logging.disable(logging.NOTSET)


def _beside_float64(train: Callable[[float, bool], TrainedModel], name: str) -> list[CheckResult]:
    """`train(max_norm, with_distclip)` of the model of `problem()`."""
    max_norm = 0.5 * train_in_float64(math.inf).norms[0]
    exact = train_in_float64(max_norm)
    own, ours = (train(max_norm, with_distclip) for with_distclip in (False, True))
    if len(ours.norms) != STEPS:
        return [_result(name, "norm", False, f"{_seen(name)}: {len(ours.norms)} norms were told")]
    norm = _apart(ours.norms, exact.norms)
    weights, own_weights = _moved_apart(ours, exact), _moved_apart(own, exact)
    return [
        _result(
            name,
            "norm",
            norm <= NORM_BOUND,
            f"{_seen(name)}: distclip's norms differ by {norm:.0e} from float64",
        ),
        _result(
            name,
            "weights",
            weights <= WEIGHT_BOUND,
            f"their change differs by {weights:.0e} from float64",
        ),
        _result(
            name,
            "own",
            own_weights <= OWN_BOUND,
            f"with {name}'s own clipping by {own_weights:.0e}",
        ),
    ]


def _torchtitan_compared(name: str) -> list[CheckResult]:
    """Its own model: norms beside those of the same gradients in float64, and losses beside those
    of its own clipping."""
    from distclip.cli.doctor.torchtitan_job import MAX_NORM, train_with_torchtitan

    own, ours = (train_with_torchtitan(with_distclip) for with_distclip in (False, True))
    if min(len(own.losses), len(ours.losses)) != STEPS:
        raise RuntimeError(f"{len(own.losses)} and {len(ours.losses)} steps were logged")
    norm = _apart(ours.norms, ours.exact_norms)
    own_losses, own_norms = _apart(ours.losses, own.losses), _apart(ours.norms, own.norms)
    clipped = sum(norm > MAX_NORM for norm in ours.exact_norms)
    return [
        _result(
            name,
            "norm",
            norm <= NORM_BOUND and clipped > 0,
            f"{_seen(name)}, {clipped} clipped: distclip's norms differ by {norm:.0e} from float64",
        ),
        _result(
            name,
            "own",
            own_losses <= LOSS_BOUND and own_norms <= OWN_BOUND,
            f"with {name}'s own clipping losses differ by {own_losses:.0e}, norms by "
            f"{own_norms:.0e}",
        ),
    ]


def _seen(name: str) -> str:
    package = "megatron-core" if name == "megatron" else name
    return f"{name} {version(package)}, {STEPS} steps"


def _result(name: str, check: str, good: bool, seen: str) -> CheckResult:
    remedy = (
        "run it again with --json, and report both its output and the versions; the versions that "
        f"were run with {name} stand in docs/compatibility.md"
    )
    return CheckResult(check, "pass" if good else "fail", seen, "" if good else remedy)


def _apart(some: Iterable[float], others: Iterable[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(some, others, strict=True))


def _moved_apart(trained: TrainedModel, exact: TrainedModel) -> float:
    """The difference between two ends, relative to the way from the start."""
    start = params_of(problem()[0])
    apart = sum(
        float((a - b).square().sum()) for a, b in zip(trained.params, exact.params, strict=True)
    )
    way = sum(float((a - b).square().sum()) for a, b in zip(start, exact.params, strict=True))
    return math.sqrt(apart / way)


def _megatron_lacks() -> str:
    if torch.cuda.is_available():
        return ""
    return (
        "Megatron-Core's optimizers need a CUDA device and there is none here. Run this where one "
        "is; or run a few steps of your job with clip_grad=0.0 and "
        "distclip.integrations.megatron.attach(...), and without: the norms that optimizer.step() "
        "returns must agree to about 1e-4"
    )


def _torchtitan_lacks() -> str:
    if torch.accelerator.is_available():
        return ""
    return (
        "torchtitan needs an accelerator and there is none here. Run this where one is; or run a "
        "few steps of your job with --override.imports distclip.integrations.torchtitan.clip, and "
        "without: loss and grad_norm in its log must agree to about 1e-4"
    )


JOBS = {
    "accelerate": FrameworkJob(partial(_beside_float64, train_with_accelerate)),
    "deepspeed": FrameworkJob(partial(_beside_float64, train_with_deepspeed), around_deepspeed),
    "lightning": FrameworkJob(partial(_beside_float64, train_with_lightning)),
    "megatron": FrameworkJob(
        partial(_beside_float64, train_with_megatron), around_megatron, _megatron_lacks
    ),
    "torchtitan": FrameworkJob(_torchtitan_compared, around_torchtitan, _torchtitan_lacks),
    "transformers": FrameworkJob(partial(_beside_float64, train_with_transformers)),
}
