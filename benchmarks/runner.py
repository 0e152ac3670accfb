"""One case in this process; `__main__` gives each a process of its own, so that no cache, thread or
leftover of one meets another."""

from __future__ import annotations

import os
import platform
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES
from benchmarks.timing import QUICK, Effort, read_bandwidth


def active_kernels() -> str:
    """`torch`, or the name of the kernels that distclip uses here."""
    try:
        return str(import_module("distclip.kernels").active()).split()[0]
    except (ModuleNotFoundError, AttributeError):
        return "torch"


def run(name: str, quick: bool, wanted: str | None) -> dict[str, Any]:
    """One case, in this process: its rows, and what machine they are from.

    Raises:
        SystemExit: the kernels that were asked for are not the active ones.
    """
    case = CASES[name]
    torch.set_num_threads(min(case.threads, os.cpu_count() or 1))
    kernels = active_kernels()
    if wanted is not None and wanted != kernels:
        raise SystemExit(
            f"benchmarks: --kernels {wanted} was asked for, but "
            f"distclip.kernels.active() is {kernels!r} here"
        )
    module, function = case.where.split(":")
    answer = getattr(import_module(f"benchmarks.{module}"), function)(
        QUICK if quick else Effort(), kernels
    )
    rows, extra = answer if isinstance(answer, tuple) else (answer, {})
    threads = torch.get_num_threads()
    records = [row.to_dict() | {"threads": threads if row.ranks == 1 else 1} for row in rows]
    return {"machine": machine(quick), "rows": records} | extra


def machine(quick: bool) -> dict[str, Any]:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory = next(
        (
            int(line.split()[1]) >> 20
            for line in _lines("/proc/meminfo")
            if line.startswith("MemTotal")
        ),
        0,
    )
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    bandwidth = read_bandwidth(quick)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": memory,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "read_gb_s": [bandwidth.median, bandwidth.q1, bandwidth.q3],
        "bandwidth_threads": torch.get_num_threads(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
