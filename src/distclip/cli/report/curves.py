"""Curves over the steps: the norm with the clipped steps, coefficient, clip rate, cosine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distclip.cli.report.plotting import INK, STEP_LABEL, series_colour, whole_steps
from distclip.cli.report.thinning import (
    clipped_shares,
    known_points,
    spread_evenly,
    stretches_for,
    thinned_points,
)
from distclip.cli.run_log import RunLog

_DRAWABLE = (1e-150, 1e150)  # matplotlib's margins overflow beyond


def draw_norm(figure: Any, wide: bool, runs: Sequence[RunLog]) -> None:
    """Norm and threshold, and below them a strip for each run, filled where it was clipped."""
    strip = min(0.22 * len(runs), 1.6) + 0.1
    top, below = figure.subplots(
        2, 1, sharex=True, height_ratios=[figure.get_figheight() - strip, strip]
    )
    _draw_curves(top, wide, runs, lambda run: run.norm, log=True)
    stretches = stretches_for(len(runs), wide)
    for i, run in enumerate(runs):
        if not run.clamps and len(run.groups) <= 1:
            x, y = known_points(run, run.threshold)
            top.plot(
                *thinned_points(x, y, stretches),
                color=series_colour(i),
                ls=(0, (5, 3)),
                lw=1.3,
                drawstyle="steps-mid",
            )
        gone = spread_evenly(run.step[~run.finite].numpy(), stretches)
        if len(gone):
            marks = top.plot(
                gone,
                [0.98] * len(gone),
                "x",
                color=series_colour(i),
                ms=5,
                mew=1.4,
                transform=top.get_xaxis_transform(),
            )
            marks[0].set(clip_on=False, in_layout=False)
        x, share = clipped_shares(run, stretches)
        row = len(runs) - 1 - i
        below.fill_between(
            x,
            row,
            row + 0.8 * np.where(share > 0, np.maximum(share, 0.3), 0),
            step="mid",
            color=series_colour(i),
            lw=0,
        )
        left = spread_evenly(run.step[run.skipped].numpy(), stretches)
        below.plot(left, [row + 0.4] * len(left), "x", color=INK, ms=4, mew=1.2)
    top.set_ylabel("norm (unit of the gradients)")
    below.set(
        ylim=(-0.15, len(runs)),
        yticks=[len(runs) / 2 - 0.1],
        yticklabels=["clipped"],
        xlabel=STEP_LABEL,
    )
    below.tick_params(axis="y", length=0)
    below.grid(False)
    below.spines["left"].set_visible(False)


def draw_lines(
    figure: Any,
    wide: bool,
    runs: Sequence[RunLog],
    of: Callable[[RunLog], Any],
    label: str,
    limits: Any = None,
    log: bool = False,
) -> None:
    """One column of the logs."""
    axes = figure.subplots()
    _draw_curves(axes, wide, runs, of, log)
    axes.set(xlabel=STEP_LABEL, ylabel=label, **({"ylim": limits} if limits else {}))


def _draw_curves(
    axes: Any, wide: bool, runs: Sequence[RunLog], of: Callable[[RunLog], Any], log: bool
) -> None:
    """One line for each run: min and max of each stretch where there are more steps than the figure
    can resolve."""
    positive = False
    for i, run in enumerate(runs):
        values = of(run)
        # gaps where the norm is not finite; where only this number is missing the line is drawn
        # across
        keep = values.isfinite() | ~run.finite
        x, y = run.step[keep].numpy(), np.where(run.finite[keep], values[keep], np.nan)
        if log:
            y = np.where(y > 0, y, np.nan).clip(*_DRAWABLE)
        positive = positive or bool(np.isfinite(y).any())
        x, y = thinned_points(x, y, stretches_for(len(runs), wide))
        axes.plot(x, y, color=series_colour(i), marker="." if np.isfinite(y).sum() < 40 else None)
    if log and positive:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_tick_label)
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_formatter(_tick_at_2_and_5 if high < 100 * low else _no_tick)
        if high < 10 * low:  # otherwise there may be no labelled tick at all
            axes.set_ylim(low / 2, high * 1.3)
    whole_steps(axes, wide)


def _tick_label(value: float, _: object = None) -> str:
    return f"{value:g}".replace("e+", "e").replace("e-0", "e-")


def _tick_at_2_and_5(value: float, _: object = None) -> str:
    return _tick_label(value) if f"{value:e}"[0] in "25" else ""


def _no_tick(value: float, _: object = None) -> str:
    return ""
