"""`distclip doctor --framework NAME`: the smallest training of that framework, with its own
clipping and with distclip's, beside the same steps in float64 without it."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import traceback
import warnings
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version

from distclip.cli.doctor.framework_jobs import (
    ELSEWHERE,
    JOBS,
    STEPS,
    TrainedModel,
    integration,
    params_of,
    problem,
    train_in_float64,
)
from distclip.cli.doctor.output import DoctorOutput, as_json, as_table
from distclip.cli.doctor.records import CannotRun, CheckResult

# of a norm in float32, and of weights after the steps, relative to how far they moved: torch's own
# norm is off by 1e-4 on a CPU
NORM_BOUND, WEIGHT_BOUND, OWN_BOUND = 1e-5, 1e-5, 1e-3


def run(options: argparse.Namespace) -> int:
    """In one process; the exit code of the table."""
    name: str = options.framework
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print("distclip doctor --framework: run it without torchrun", file=sys.stderr)
        return 2
    findings = DoctorOutput()
    try:
        findings.results = _compared(name)
    except (CannotRun, ModuleNotFoundError, PackageNotFoundError) as error:
        findings.stopped = str(error)
    except Exception as error:
        traceback.print_exc()
        findings.stopped = f"{name}: {type(error).__name__}: {error}"
    print(as_json(findings) if options.json else as_table(findings), flush=True)
    return findings.exit_code


def _compared(name: str) -> list[CheckResult]:
    if name in ELSEWHERE:
        raise CannotRun(ELSEWHERE[name])
    max_norm = 0.5 * train_in_float64(math.inf).norms[0]
    exact = train_in_float64(max_norm)
    # warnings and lines of the framework itself; standard output is for the results
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            integration(name)
            job = JOBS[name]
            with job.surroundings():
                own, ours = (job.train(max_norm, with_distclip) for with_distclip in (False, True))
        finally:
            logging.disable(logging.NOTSET)
    seen = f"{name} {version(name)}, {STEPS} steps"
    if len(ours.norms) != STEPS:
        text = f"{seen}: {len(ours.norms)} norms were told"
        return [CheckResult("norm", "fail", text, _REMEDY.format(name))]
    norm = max(abs(a / b - 1) for a, b in zip(ours.norms, exact.norms, strict=True))
    weights, own_weights = _moved_apart(ours, exact), _moved_apart(own, exact)
    return [
        _result(
            "norm",
            norm <= NORM_BOUND,
            f"{seen}: distclip's norms differ by {norm:.0e} from float64",
            name,
        ),
        _result(
            "weights",
            weights <= WEIGHT_BOUND,
            f"their change differs by {weights:.0e} from float64",
            name,
        ),
        _result(
            "own",
            own_weights <= OWN_BOUND,
            f"with {name}'s own clipping by {own_weights:.0e}",
            name,
        ),
    ]


_REMEDY = (
    "run it again with --json, and report both its output and the versions; the versions that were "
    "run with {} stand in docs/compatibility.md"
)


def _result(check: str, good: bool, seen: str, name: str) -> CheckResult:
    return CheckResult(
        check, "pass" if good else "fail", seen, "" if good else _REMEDY.format(name)
    )


def _moved_apart(trained: TrainedModel, exact: TrainedModel) -> float:
    """The difference between two ends, relative to the way from the start."""
    start = params_of(problem()[0])
    apart = sum(
        float((a - b).square().sum()) for a, b in zip(trained.params, exact.params, strict=True)
    )
    way = sum(float((a - b).square().sum()) for a, b in zip(start, exact.params, strict=True))
    return math.sqrt(apart / way)
