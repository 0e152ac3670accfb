"""The options of each `distclip` command. Imports neither torch nor the commands, so that help and
usage errors appear at once."""

from __future__ import annotations

import argparse
import math
from importlib import import_module

# those of JOBS in cli/doctor/frameworks.py
FRAMEWORKS = ("accelerate", "deepspeed", "lightning", "megatron", "torchtitan", "transformers")
_EPILOG_DOCTOR = """\
exit codes:  0  all checks passed    1  a check failed    2  it could not run to the end
             torchrun answers 1 for both 1 and 2, and prints each rank's own code.

examples:    torchrun --nproc-per-node 4 -m distclip doctor
             torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint \
HOST:29500 -m distclip doctor
             distclip doctor --only copies --json
             distclip doctor --framework accelerate

A rank that is lost or stuck ends the run within the time-out and 20 s, and is named together \
with the collective.
"""
_EPILOG_LOGS = """\
exit codes:  0  done    1  it could not be made or written    2  wrong options, or a log of which \
nothing can be read

Of a folder, files that are no log of distclip are left out and named. A file that is named \
itself must be one.
"""


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG_DOCTOR
    parser.add_argument("--list", action="store_true", help="list the checks and end")
    parser.add_argument(
        "--only",
        action="append",
        type=_known_check,
        metavar="NAME",
        help="run this check; may be given several times",
    )
    parser.add_argument(
        "--framework",
        choices=FRAMEWORKS,
        metavar="NAME",
        help="instead of the checks the smallest training of a framework, with its own clipping "
        f"and with distclip's, in one process: {', '.join(FRAMEWORKS)} (megatron and torchtitan "
        "need a GPU)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document instead of the table"
    )
    parser.add_argument(
        "--backend",
        choices=("gloo", "nccl"),
        help="of the process group: nccl (the default with CUDA) or gloo, which runs on the CPU",
    )
    parser.add_argument(
        "--timeout",
        type=_positive_seconds,
        default=40.0,
        metavar="SECONDS",
        help="of every collective (default: 40)",
    )


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    _add_log_arguments(parser)
    parser.add_argument(
        "--output",
        default="report.html",
        metavar="FILE.html",
        help="the page (default: report.html)",
    )
    parser.add_argument(
        "--png", metavar="FOLDER", help="also draw the figures as PNG, into this folder"
    )


def add_suggest_arguments(parser: argparse.ArgumentParser) -> None:
    _add_log_arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="machine-readable: one object with a list of runs"
    )


def _add_log_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG_LOGS
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a file that JSONLSink wrote, or a folder of them"
    )


def _known_check(name: str) -> str:
    names = [check.name for check in import_module("distclip.cli.doctor.command").CHECKS]
    if name not in names:
        raise argparse.ArgumentTypeError(f"{name!r} is no check; the checks are {', '.join(names)}")
    return name


def _positive_seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value
