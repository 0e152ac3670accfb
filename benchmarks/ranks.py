"""Several gloo ranks on this machine: DDP, FSDP1, FSDP2, tensor parallel with FSDP2; one thread a
rank."""

from __future__ import annotations

from typing import Any

from benchmarks.floors import floor
from benchmarks.layouts import CLIP, LAYOUTS, LOCAL
from benchmarks.on_ranks import measure_layout
from benchmarks.records import Row, Spread
from benchmarks.timing import Effort, ratios
from distclip.testing import World


def ddp(effort: Effort, kernels: str) -> list[Row]:
    return of_layout("ddp", effort, kernels)


def fsdp1(effort: Effort, kernels: str) -> list[Row]:
    return of_layout("fsdp1", effort, kernels)


def fsdp2(effort: Effort, kernels: str) -> list[Row]:
    return of_layout("fsdp2", effort, kernels)


def tp(effort: Effort, kernels: str) -> list[Row]:
    return of_layout("tp", effort, kernels)


def of_layout(name: str, effort: Effort, kernels: str) -> list[Row]:
    rows: list[Row] = []
    worlds, counts = ((2,), (10,)) if effort.quick else ((2, 4), (10, 100, 1000))
    for size in worlds:
        with World(size) as world:
            for count in counts:
                for variant in LAYOUTS[name].variants:
                    answers = world.run(
                        measure_layout, name, variant, count, effort, timeout=400.0
                    )[0]
                    for state, found in answers.items():
                        # in the plot
                        shown = size == worlds[-1] and variant == LAYOUTS[name].variants[0]
                        rows += rows_of(name, variant, state, count, size, found, kernels, shown)
    return rows


def rows_of(
    name: str,
    variant: str,
    state: str,
    count: int,
    ranks: int,
    found: dict[str, Any],
    kernels: str,
    shown: bool,
) -> list[Row]:
    """`found`: wall, local and CPU seconds by contender and round, and of the bare message and of
    one number."""
    layout, message, one = LAYOUTS[name], Spread.of(found["message"]), Spread.of(found["one"])
    what = f"{count:,} parameters{variant and f', {variant}'}, {state}"
    sent = (
        f"the message of {found['words']} words alone: {1e3 * message.median:.2f} ms, of one "
        f"number: {1e3 * one.median:.2f} ms"
    )
    rows: list[Row] = []
    for i, (peer, ours) in enumerate(layout.pairs(found["wall"])):
        key = (
            f"{name} {count} on {ranks}{'' if name == 'fsdp1' else f', {state}'}" if i == 0 else ""
        )
        limits = floor(key, kernels)
        if layout.peer_sends_nothing and ours == CLIP:
            limits = {}  # the peer sends nothing: only the local part is compared
        note = f"ratio of CPU time {ratios(found['cpu'], peer, ours).median:.2f}; {sent}"
        names, is_main = (ours, peer), shown and i == 0
        for times in (found["wall"], found["local"])[: 1 + layout.has_local_parts]:
            rows.append(
                Row(
                    name, what, ratios(times, peer, ours), "x", *names, Spread.of(times[peer]),
                    Spread.of(times[ours]), kernels=kernels, ranks=ranks, main=is_main, note=note, **limits,
                )
            )  # fmt: skip
            names, is_main, limits = (LOCAL, f"{peer}, local part"), False, floor("", kernels)
    return rows
