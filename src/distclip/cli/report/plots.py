"""Which figures `distclip report` shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from distclip.cli.glyphs import shorten_name
from distclip.cli.report.curves import draw_lines, draw_norm
from distclip.cli.report.heat import heat_map
from distclip.cli.report.plotting import DrawnFigure, PlannedFigure, draw_plans
from distclip.cli.run_log import RunLog


def draw_figures(runs: Sequence[RunLog]) -> tuple[list[DrawnFigure], list[str]]:
    """All figures that these runs have the numbers for, and notes on characters that could not be
    drawn."""
    p = f"{runs[0].norm_type:g}"
    marks = (
        "Dashed: the threshold, where it is one of this norm. ×: a step whose norm was not finite. "
    )
    strip = (
        "The strip below is filled where steps were clipped (higher: more of them), × where "
        "one was skipped."
    )
    plans = [
        PlannedFigure(
            "norm",
            f"Gradient norm before clipping (p = {p})",
            marks + strip,
            lambda f, w: draw_norm(f, w, runs),
            runs,
            height=1.15,
        ),
        PlannedFigure(
            "coefficient",
            "Clip coefficient",
            "What the gradients were multiplied by; of several groups the smallest. 1: not "
            "clipped.",
            lambda f, w: draw_lines(
                f, w, runs, lambda run: run.coef, "coefficient (factor)", log=True
            ),
            runs,
        ),
        PlannedFigure(
            "clip_rate",
            "Clip rate",
            "Share of the last 500 steps (from the start: of all so far) that were clipped.",
            lambda f, w: draw_lines(
                f, w, runs, lambda run: 100 * run.clip_rate, "clipped steps (%)", (-3, 103)
            ),
            runs,
        ),
    ]
    if any(bool((run.cosine < 0.9999).any()) for run in runs):
        caption = (
            "How far value clipping bends the direction; of several groups the smallest. 1: "
            "not at all."
        )
        draw: Callable[[Any, bool], None] = lambda f, w: draw_lines(  # noqa: E731
            f, w, runs, lambda r: r.cosine, "cosine", (-0.03, 1.03)
        )
        plans.append(
            PlannedFigure("cosine", "Cosine between raw and clipped gradient", caption, draw, runs)
        )
    plans += [heat_map(i, run, parts) for i, run in enumerate(runs) for parts in run.parts]
    made, unknown = draw_plans(plans)
    note = (
        f"no font here has {shorten_name(unknown, 40)}: boxes stand for them in the PNGs; the page "
        "shows them"
    )
    return made, [note] if unknown else []
