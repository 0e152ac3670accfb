"""The block of docs/scaling.md: tables and sentences from what the case `scale` measured, so that
no number is written by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def block(found: dict[str, Any]) -> str:
    return "\n".join([message(found), set_up(found), python(found)])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [
        f"| {' | '.join(head)} |",
        "|" + "---:|" * len(head),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def time_of(seconds: float) -> str:
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{1e3 * seconds:.3g} ms"
        if seconds >= 1e-3
        else f"{1e6 * seconds:.3g} us"
    )


def size_of(count: float) -> str:
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def message(found: dict[str, Any]) -> str:
    link = found["gloo"]["link"]
    out = [
        "### The message of a step\n",
        "Measured: an all-reduce over gloo on this machine, median of the slowest rank.\n",
    ]
    out.append(
        table(
            ("ranks", "bytes", "time"),
            (
                (str(s["ranks"]), size_of(s["bytes"]), time_of(s["seconds"]))
                for s in found["gloo"]["samples"]
            ),
        )
    )
    out.append(
        f"Fitted as a ring: alpha = {time_of(link['alpha'])} a message, 1/beta = "
        f"{1e-9 / max(link['beta'], 1e-15):.2g} GB/s. "
        "The tables below put alpha and beta into the fastest of three algorithms (ring, recursive "
        "doubling, Rabenseifner's) for each "
        f"all-reduce. distclip sends a float64 for each group and {found['extra']} more; torch's "
        f"`clip_grad_norm_` on DTensors sends a "
        "float32 for each tensor, once for each dimension of the mesh.\n"
    )
    for one in (link, *found["links"]):
        out.append(f"**{one['name']}**: {one['source']}.\n")
        rows = [
            (
                f"{p['ranks']:,}",
                f"{p['tensors']:,}",
                *(time_of(p[k]) for k in ("one", "per_parameter", "torch 1-D", "torch 2-D")),
            )
            for p in found["predictions"]
            if p["link"] == one["name"]
        ]
        out.append(
            table(
                (
                    "ranks",
                    "tensors",
                    "distclip, one group",
                    "distclip, a group a tensor",
                    "torch, 1-D mesh",
                    "torch, 2-D mesh",
                ),
                rows,
            )
        )
    return "\n".join(out)


def set_up(found: dict[str, Any]) -> str:
    out = [
        "### Set-up\n",
        "Measured on threads as ranks: CPU time, messages, bytes, and the memory that the plan "
        "keeps, each of one rank.\n",
    ]
    rows = [
        (
            w["layout"], f"{w['ranks']}", f"{w['parameters']:,}", f"{w['groups']:,}", time_of(w["seconds"]), str(w["messages"]),
            size_of(w["bytes"]), size_of(w["kept"]),
        )
        for w in found["worlds"]
    ]  # fmt: skip
    out.append(
        table(
            (
                "layout",
                "ranks",
                "parameters a rank",
                "groups",
                "CPU time",
                "messages",
                "bytes",
                "memory",
            ),
            rows,
        )
    )
    out.append(
        "The agreement's arithmetic alone, of one rank, and the bytes that its messages "
        "would have:\n"
    )
    rows = [
        (
            a["layout"],
            f"{a['ranks']:,}",
            f"{a['parameters']:,}",
            time_of(a["seconds"]),
            size_of(a["bytes"]),
        )
        for a in found["arithmetic"]
    ]
    out.append(table(("layout", "ranks", "parameters a rank", "CPU time", "bytes"), rows))
    out.append(
        "Building a clipper in one process, by the number of `shared` tuples and of "
        "`by_name` patterns:\n"
    )
    rows = [
        (f"{d['parameters']:,}", f"{d['number']:,}", time_of(d["shared"]), time_of(d["patterns"]))
        for d in found["declared"]
    ]
    out.append(table(("parameters", "tuples or patterns", "`shared=`", "`by_name`"), rows))
    out.append(
        "The weights of the drift word, made once a process and number of holders; the smallest "
        "tells how well one faulty copy shows:\n"
    )
    rows = [
        (f"{w['holders']:,}", time_of(w["seconds"]), f"{w['smallest']:.2f}")
        for w in found["weights"]
    ]
    out.append(table(("holders", "CPU time", "smallest weight"), rows))
    return "\n".join(out)


def python(found: dict[str, Any]) -> str:
    out = ["### Python's work for each parameter and group\n"]
    out.append(
        f"`clip_` on tensors of 8 elements, in one process without a message "
        f"({found['kernels']} kernels), nothing to clip:\n"
    )
    rows = [
        (
            f"{c['parameters']:,}", time_of(c["one"]), time_of(c["one"] / c["parameters"]), time_of(c["each"]),
            time_of(max(0.0, c["each"] - c["one"]) / c["parameters"]), size_of(8 * c["words"]),
        )
        for c in found["calls"]
    ]  # fmt: skip
    out.append(
        table(
            (
                "parameters",
                "one group",
                "a parameter",
                "a group each",
                "more for each group",
                "message with a group each",
            ),
            rows,
        )
    )
    out.append(
        "`AGC` scales each unit (a row of a weight, a whole bias); on two gloo ranks, "
        "beside a norm clip of the same model:\n"
    )
    rows = [
        (
            u["layout"], f"{u['parameters']:,}", f"{u['units']:,}", time_of(u["norm"]), size_of(8 * u["norm_words"]),
            time_of(u["agc"]), size_of(8 * u["agc_words"]),
        )
        for u in found["units"]
    ]  # fmt: skip
    out.append(
        table(
            ("layout", "parameters", "units", "norm", "its message", "`AGC`", "its message"), rows
        )
    )
    return "\n".join(out)
