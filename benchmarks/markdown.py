"""RESULTS.md: the same table for reading in a browser. No dates: the machine and the versions say
what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from benchmarks.cases import CASES
from benchmarks.records import Row
from benchmarks.table import amount, cells, duration, machine_line, tally

INTRODUCTION = """# Benchmark results

Written by `python -m benchmarks --kernels both --json benchmarks/results.json --plot benchmarks/results.png --write benchmarks/RESULTS.md`;
no number here was written by hand.

{machine}

{tally}

Peer and distclip take turns in one process (or in the same ranks), each round in the other order, with the same gradients; a restored
copy comes before each turn where gradients change. Ratios are paired by round. On several ranks a turn starts at a barrier and lasts
until the slowest rank is done. `>= 1 (peer)` means that no floor was set beyond being no slower.
"""


def page(machine: dict[str, Any], rows: Sequence[Row], plot: str | None) -> str:
    parts = [INTRODUCTION.format(machine=machine_line(machine), tally=tally(rows))]
    if plot is not None:
        parts.append(f"![Ratio to the peer by case, with floors]({plot})\n")
    for case, group in groupby(
        sorted(rows, key=lambda row: list(CASES).index(row.case)), key=lambda row: row.case
    ):
        parts.append(section(case, CASES[case].line, list(group)))
    return "\n".join(parts)


def section(case: str, line: str, rows: Sequence[Row]) -> str:
    lines = [f"## {case}: {line}\n"]
    lines.append(
        "| | distclip | peer | kernels | ranks × threads | peer | own | value (quartiles) "
        "| floor | verdict |"
    )
    lines.append("|---|---|---|---|---|---:|---:|---:|---|---|")
    notes: list[str] = []
    for row in rows:
        _, what, ours, peer, kernels, where, *_, spread, floor, verdict = cells(row)
        value = f"**{amount(row.value.median, row.unit)}**" + (f" ({spread})" if spread else "")
        mark = ""
        if row.note:
            if row.note not in notes:
                notes.append(row.note)
            mark = f" [{notes.index(row.note) + 1}]"
        times = (duration(row.peer_s), duration(row.ours_s))
        cell = (
            what + mark,
            f"`{ours}`" if ours else "",
            peer,
            kernels,
            where.replace("x", "×"),
            *times,
            value,
            floor,
            verdict,
        )
        lines.append("| " + " | ".join(cell) + " |")
    lines += [f"\n[{i}] {note}" for i, note in enumerate(notes, 1)]
    return "\n".join(lines) + "\n"
