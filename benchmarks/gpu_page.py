"""The table and the page of the cases on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from benchmarks.markdown import section
from benchmarks.records import Row
from benchmarks.table import lined_up, tally

INTRODUCTION = """# Benchmark results on a GPU

Written by `python -m benchmarks --device cuda --write benchmarks/RESULTS_GPU.md`; no number here was written by hand.

{machine}

{tally}

Peer and distclip take turns in one process, each round in the other order, with the same gradients; a restored copy comes before each turn
where gradients change, and twice the device's cache is overwritten between turns. A time is that between two CUDA events around the call on
an idle device: the host's part is in it. Ratios are paired by round. Notes give the ratio of the kernels alone (the device was kept busy
until the host was done; where a call waits for the device, as `clip_` does to skip a bad step, the gap after it is in that) and the host's
times (the peer's and distclip's). `>= 1 (peer)` means that no floor was set beyond being no slower.
"""


def machine_line(machine: dict[str, Any]) -> str:
    read, both = machine["read_gb_s"], machine["read_write_gb_s"]
    return (
        f"{machine['device']}, {machine['processors']} multiprocessors, {machine['memory_gib']} "
        f"GiB, compute capability "
        f"{machine['capability']}; torch {machine['torch']}, triton {machine['triton']}; reads "
        f"{read[0]:,.0f} GB/s "
        f"({read[1]:,.0f}-{read[2]:,.0f}), reads and writes {both[0]:,.0f} GB/s "
        f"({both[1]:,.0f}-{both[2]:,.0f}), measured in the same run"
    )


def text(found: dict[str, Any], rows: Sequence[Row]) -> str:
    """For a terminal."""
    lines = [machine_line(found["machine"]), *found["missing"]]
    if found["quick"]:
        lines.append("--quick: tiny sizes, few rounds; these figures measure nothing")
    return "\n".join([*lines, *lined_up(rows), tally(rows)])


def page(found: dict[str, Any], rows: Sequence[Row], plot: str | None) -> str:
    from benchmarks.gpu_cases import CASES

    parts = [INTRODUCTION.format(machine=machine_line(found["machine"]), tally=tally(rows))]
    parts += [f"{missing}\n" for missing in found["missing"]]
    parts += [
        f"The case `{name}` raised {error}\n" for name, error in found.get("failed", {}).items()
    ]
    if plot is not None:
        parts.append(f"![Ratio to the peer by case, with floors]({plot})\n")
    order = list(CASES)
    for case, group in groupby(
        sorted(rows, key=lambda row: order.index(row.case)), key=lambda row: row.case
    ):
        parts.append(section(case, CASES[case].line, list(group)))
    return "\n".join(parts)
