"""The printed table: ratio, spread, floor and verdict, and the machine they are from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.records import Row, Spread

HEAD = (
    "case",
    "what",
    "distclip",
    "peer",
    "kernels",
    "ranks x threads",
    "peer's time",
    "own time",
    "value",
    "quartiles",
    "floor",
    "verdict",
)


def machine_line(machine: dict[str, Any]) -> str:
    median, q1, q3 = machine["read_gb_s"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; torch "
        f"{machine['torch']}, Python {machine['python']}; "
        f"reads {median:.1f} GB/s ({q1:.1f}-{q3:.1f}) with {machine['bandwidth_threads']} threads"
    )


def duration(spread: Spread | None) -> str:
    if spread is None:
        return ""
    seconds = spread.median
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{1e3 * seconds:.2f} ms"
        if seconds >= 1e-3
        else f"{1e6 * seconds:.0f} us"
    )


def amount(value: float, unit: str) -> str:
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}" if unit in ("x", "of 1") else f"{value:,.{digits}f} {unit}"


def cells(row: Row) -> tuple[str, ...]:
    floor = (
        ""
        if row.floor is None
        else f"{'>=' if row.at_least else '<='} "
        f"{amount(row.floor, row.unit)}{'' if row.issue else ' (peer)'}"
    )
    spread = "" if row.value.n == 1 else f"{amount(row.value.q1, 'x')}-{amount(row.value.q3, 'x')}"
    return (
        row.case, row.what, row.ours, row.peer, row.kernels, f"{row.ranks} x {row.threads}", duration(row.peer_s), duration(row.ours_s),
        amount(row.value.median, row.unit), spread, floor, row.verdict,
    )  # fmt: skip


def tally(rows: Sequence[Row]) -> str:
    """How many of the floors that were set were reached, and how many other comparisons are slower
    than their peer."""
    asked = [row for row in rows if row.issue]
    others = [row for row in rows if row.floor is not None and not row.issue]
    reached = sum(row.verdict == "reached" for row in asked)
    slower = sum(row.verdict == "not reached" for row in others)
    return (
        f"{reached} of {len(asked)} floors reached; of {len(others)} other comparisons {slower} "
        f"slower than the peer. The value "
        "is peer / own, the median of paired rounds, unless a unit stands there; `level`: 1 lies "
        "between the quartiles."
    )


def lined_up(rows: Sequence[Row]) -> list[str]:
    """The head and a line for each row."""
    lines = [HEAD, *(cells(row) for row in rows)]
    width = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    right = (6, 7, 8)
    out: list[str] = []
    for line, row in zip(lines, (None, *rows), strict=True):
        shown = "  ".join(
            c.rjust(w) if i in right else c.ljust(w)
            for i, (c, w) in enumerate(zip(line, width, strict=True))
        )
        out.append(shown.rstrip() + (f"  ({row.note})" if row is not None and row.note else ""))
    return out


def text(machine: dict[str, Any], rows: Sequence[Row], quick: bool) -> str:
    out = [machine_line(machine)]
    if quick:
        out.append("--quick: tiny sizes, few rounds; these figures measure nothing")
    return "\n".join([*out, *lined_up(rows), tally(rows)])
