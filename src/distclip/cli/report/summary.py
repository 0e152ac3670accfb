"""A run in plain words and in a few numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from distclip.cli.log_header import RunHeader
from distclip.cli.run_log import RunLog
from distclip.cli.suggest.advice import percent


def run_sentences(run: RunLog) -> Iterator[str]:
    """How many steps, what became of them, and their norms."""
    steps, rate = len(run), percent(float(run.clipped.mean()))
    limits = [limit for limit in run.limits if math.isfinite(limit)]
    known = run.threshold[np.isfinite(run.threshold)]
    if not limits:
        what = "No threshold was set: it only measured."
    elif len(set(limits)) > 1:
        what = (
            f"{rate} were clipped; {len(limits)} groups have thresholds from "
            f"{min(limits):.4g} to {max(limits):.4g}."
        )
    elif len(known) and float(known.max()) > float(known.min()):
        what = (
            f"{rate} were clipped, to a threshold between {float(known.min()):.4g} and "
            f"{float(known.max()):.4g}."
        )
    elif run.clamps:
        what = f"At {rate} elements were clamped to ±{limits[0]:.4g}."
    else:
        where = " in each group" if len(limits) > 1 else ""
        what = f"{rate} were clipped, to a norm of {limits[0]:.4g}{where}."
    skipped = int(run.skipped.sum())
    left = (
        "None was skipped."
        if not skipped
        else f"{skipped:,} {'was' if skipped == 1 else 'were'} skipped."
    )
    yield f"{steps:,} step{'s' if steps > 1 else ''}. {what} {left}"
    norms = run.norm[run.finite]
    if len(norms):
        at = int(np.where(run.finite, run.norm, -1.0).argmax())
        yield (
            f"Norm before clipping: median {float(np.median(norms)):.4g}, "
            f"largest {float(norms.max()):.4g} (step {int(run.step[at]):,})."
        )
    else:
        yield "No norm is finite."


def header_facts(run: RunLog) -> list[tuple[str, str]]:
    """(name, value) of what the log's header says, without what is not known. Empty for a log
    without one."""
    if not run.headers:
        return []
    first, header = run.headers[0], run.headers[-1]
    groups = f"{len(header.groups)} groups" if len(header.groups) > 1 else ""
    facts = [
        ("run", header.run),
        ("policy", header.policy),
        ("groups", groups),
        ("norm", f"p = {run.norm_type:g}"),
        ("ranks", "" if header.world_size is None else f"{header.world_size}"),
        ("not finite", header.on_nonfinite),
        ("watched", f"{len(header.layers)} layers" if header.layers else ""),
        ("parameters", _parameters(header)),
        ("started by", header.launcher),
        ("device", header.device),
        ("versions", ", ".join(f"{name} {version}" for name, version in header.versions)),
        ("begun", _date(first.date)),
        ("resumed", _resumed(run)),
    ]
    return [(name, value) for name, value in facts if value]


def _parameters(header: RunHeader) -> str:
    if not header.plan:
        return ""
    num, elements = (
        sum(row.parameters for row in header.plan),
        sum(row.elements for row in header.plan),
    )
    return f"{num:,} with {elements:,} elements"


def _date(text: str) -> str:
    """2026-11-26T21:00:00+00:00 → 2026-11-26 21:00 UTC."""
    short = text[:16].replace("T", " ")
    return f"{short} UTC" if text.endswith("+00:00") else text


def _resumed(run: RunLog) -> str:
    num = len(run.headers) - 1
    if not num:
        return ""
    return f"{'once' if num == 1 else f'{num} times'}, last {_date(run.headers[-1].date)}"


def main_numbers(run: RunLog) -> list[tuple[str, str]]:
    """Rows of the table of main numbers."""
    norms = run.norm[run.finite]
    taken = run.coef[np.isfinite(run.coef) & ~run.skipped]
    return [
        ("steps", f"{len(run):,}"),
        ("first and last step", f"{int(run.step[0]):,} – {int(run.step[-1]):,}"),
        ("clipped", f"{float(run.clipped.mean()):.2%}"),
        ("clipped, of the last 500 steps", f"{float(run.clip_rate[-1]):.2%}"),
        ("skipped", f"{int(run.skipped.sum()):,}"),
        ("norm not finite", f"{int((~run.finite).sum()):,}"),
        ("median norm", f"{float(np.median(norms)):.5g}" if len(norms) else "–"),
        ("largest norm", f"{float(norms.max()):.5g}" if len(norms) else "–"),
        ("norm type p", f"{run.norm_type:g}"),
        ("last threshold", _limits_text(run)),
        (
            "smallest coefficient of a step that was taken",
            f"{float(taken.min()):.4g}" if len(taken) else "–",
        ),
        ("groups", f"{max(1, len(run.groups)):,}"),
    ]


def _limits_text(run: RunLog) -> str:
    finite = [limit for limit in run.limits if math.isfinite(limit)]
    if not finite:
        return "none"
    return f"{finite[0]:.4g}" if len(set(finite)) == 1 else f"{min(finite):.4g} – {max(finite):.4g}"
