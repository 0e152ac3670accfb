"""Where the parts of distclip stop scaling: set-up, the message, the groups, Python's work for each
parameter."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import distclip
from benchmarks import problems
from benchmarks.layouts import LAYOUTS
from benchmarks.model import INFINIBAND, measured, predictions
from benchmarks.on_ranks import in_turns
from benchmarks.records import Row, Spread
from benchmarks.timing import Contender, Effort, interleaved
from benchmarks.worlds import arithmetic, worlds
from distclip.setup.replicas import drift_pattern
from distclip.testing import World


def scale(effort: Effort, kernels: str) -> tuple[list[Row], dict[str, Any]]:
    quick = effort.quick
    # forks ranks, as the next does: before this process makes threads
    link, samples = measured(quick)
    with World(2) as world:
        by_units = [
            world.run(units, layout, 10 if quick else 100, effort, timeout=200.0)[0]
            for layout in ("fsdp2", "tp")
        ]
    by_count = calls(effort)
    extra = by_count[0]["words"] - by_count[0]["parameters"]
    found = {
        "extra": extra,
        "gloo": {"samples": samples, "link": asdict(link)},
        "links": [asdict(INFINIBAND)],
        "predictions": [
            entry for one in (link, INFINIBAND) for entry in predictions(one, extra, quick)
        ],
        "worlds": worlds(quick),
        "arithmetic": arithmetic(quick),
        "weights": weights(quick),
        "calls": by_count,
        "declared": declared(quick),
        "units": by_units,
        "kernels": kernels,
    }
    rows: list[Row] = []
    for w in found["worlds"]:
        what = f"set-up, {w['layout']}, {w['parameters']:,} parameters, {w['groups']:,} groups"
        value, note = (
            Spread.of([1e3 * w["seconds"]]),
            f"{w['messages']} messages, {w['bytes']:,} bytes",
        )
        rows.append(
            Row(
                "scale",
                what,
                value,
                "ms",
                "the agreement, CPU time a rank",
                kernels=kernels,
                ranks=w["ranks"],
                note=note,
            )
        )
    return rows, {"scale": found}


def weights(quick: bool) -> list[dict[str, Any]]:
    """CPU seconds of the drift weights for a number of holders, made once a process and number."""
    out: list[dict[str, Any]] = []
    for holders in (8, 64) if quick else (8, 256, 4096, 16_384):
        start = time.process_time()
        numbers = drift_pattern(holders)
        seconds = time.process_time() - start
        out.append({"holders": holders, "seconds": seconds, "smallest": min(map(abs, numbers))})
    return out


def calls(effort: Effort) -> list[dict[str, Any]]:
    """Seconds of `clip_` on tensors of 8 elements, with one group and one for each parameter, in
    one process."""
    out: list[dict[str, Any]] = []
    for count in (10, 100) if effort.quick else (100, 1000, 10_000):
        params = problems.parameters([(8,)] * count)
        one = distclip.GradClipper(problems.named(params), 1e9)
        each = distclip.GradClipper(problems.named(params), 1e9, groups=distclip.per_parameter())
        rest = Effort(seconds=effort.seconds / 3, least=effort.least, most=effort.most)
        times = interleaved([Contender("one", one.clip_), Contender("each", each.clip_)], rest)
        medians = {name: Spread.of(seconds).median for name, seconds in times.items()}
        out.append({"parameters": count, "words": each.plan.words} | medians)
    return out


def declared(quick: bool) -> list[dict[str, Any]]:
    """CPU seconds of building a clipper of 1,000 parameters, by the number of `shared` tuples and
    of `by_name` patterns."""
    count = 100 if quick else 1000
    params = problems.parameters([(8,)] * count)
    named = problems.named(params)
    out: list[dict[str, Any]] = []
    for number in (0, 10) if quick else (0, 10, 100, 500):
        shared = tuple((f"p{2 * i}", f"p{2 * i + 1}") for i in range(number))
        table = {f"p{i}": 1.0 for i in range(number)}
        entry: dict[str, Any] = {"parameters": count, "number": number}
        for what, options in (
            ("shared", {"shared": shared}),
            ("patterns", {"groups": distclip.by_name(table) if table else None}),
        ):
            start = time.process_time()
            distclip.GradClipper(named, 1.0, **options)
            entry[what] = time.process_time() - start
        out.append(entry)
    return out


def units(layout: str, count: int, effort: Effort) -> dict[str, Any]:
    """On each of two ranks: `clip_` by the norm and by AGC's units, and the words that their
    messages have."""
    model = LAYOUTS[layout].build(count, "").model
    norm, agc = (
        distclip.GradClipper(model, 1e9),
        distclip.GradClipper(model, policy=distclip.AGC(1e9)),
    )
    times = in_turns({"norm": norm.clip_, "agc": agc.clip_}, effort)["wall"]
    rows = sum(p.shape[0] if p.ndim > 1 else 1 for p in model.parameters())
    words = {"norm_words": norm.plan.words, "agc_words": agc.plan.words}
    return (
        {"layout": layout, "parameters": count, "units": rows}
        | words
        | {k: Spread.of(t).median for k, t in times.items()}
    )
