"""Heat maps: the share of each group or layer in the norm, over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from distclip.cli.glyphs import shorten_name
from distclip.cli.report.plotting import STEP_LABEL, PlannedFigure, whole_steps
from distclip.cli.run_log import PartNorms, RunLog

_ROWS = {True: 24, False: 10}  # wide, narrow
_COLUMNS = {True: 240, False: 120}


def heat_map(number: int, run: RunLog, parts: PartNorms) -> PlannedFigure:
    """Shares of the power sum, a row for each of the largest groups."""
    shares = _norm_shares(run, parts)
    finite = shares[np.isfinite(shares).all(1)]
    mean = finite.mean(0) if len(finite) else np.zeros(len(parts.names))
    largest = np.argsort(-mean, kind="stable")
    labels, common = _short_labels(parts.names)

    def draw(figure: Any, wide: bool) -> None:
        rows = np.sort(largest[: _ROWS[wide]])
        steps = parts.steps.numpy()
        at = np.linspace(steps[0], steps[-1], min(_COLUMNS[wide], len(steps)))
        table = shares[np.searchsorted(steps, at, side="right") - 1][:, rows]
        axes = figure.subplots()
        ends = (steps[0] - 0.5, steps[-1] + 0.5, len(rows) - 0.5, -0.5)
        image = axes.imshow(
            table.T, aspect="auto", extent=ends, cmap="viridis", vmin=0, interpolation="none"
        )
        names = [shorten_name(labels[i], 30 if wide else 16) for i in rows]
        axes.set(yticks=range(len(rows)), yticklabels=names, xlabel=STEP_LABEL)
        axes.tick_params(axis="y", labelsize=7.5 if wide else 7)
        axes.grid(False)
        whole_steps(axes, wide)
        where: dict[str, Any] = {"pad": 0.01} if wide else {"location": "top", "aspect": 40}
        figure.colorbar(image, ax=axes, label="share (%)", **where)

    what = (
        "squared norm"
        if run.norm_type == 2
        else "norm to the power p"
        if math.isfinite(run.norm_type)
        else "largest norm"
    )
    caption = (
        f"Share of the {what} by {parts.kind}; bright where one dominates, empty where it "
        f"was not finite."
    )
    if len(parts.names) > _ROWS[True]:
        rest = mean[largest[_ROWS[True] :]].sum()
        caption += (
            f" The {_ROWS[True]} largest of {len(parts.names)} ({_ROWS[False]} on a narrow "
            f"screen); the others have {rest:.1f} % together."
        )
    caption += common
    height = max(0.7, 0.25 + min(len(parts.names), _ROWS[True]) * 0.055)
    return PlannedFigure(
        f"{parts.kind}s-{number + 1}",
        f"{run.name}: which {parts.kind} dominates",
        caption,
        draw,
        [run],
        height,
    )


def _norm_shares(run: RunLog, parts: PartNorms) -> Any:
    """[steps, names] float64, in percent of the power sum, or with p = inf of the largest norm; NaN
    where a norm of that step is not finite."""
    norms, p = parts.norms.numpy(), run.norm_type
    # without a finite total there are no shares
    norms = np.where(np.isfinite(norms).all(1, keepdims=True), norms, np.nan)
    largest = norms.max(1, keepdims=True)
    # powers of what is at most 1 do not overflow
    scaled = norms / np.where(largest > 0, largest, 1)
    if math.isinf(p):
        return 100 * scaled
    powers = scaled**p
    total = powers.sum(1, keepdims=True)
    return 100 * powers / np.where(total > 0, total, 1)


def _short_labels(names: Sequence[str]) -> tuple[list[str], str]:
    """Names without the dotted words that all of them begin or end with, and a sentence that names
    these."""
    words = [name.split(".") for name in names]
    room = min(map(len, words)) - 1  # one word of each name is kept
    head = next((i for i in range(room) if len({w[i] for w in words}) > 1), room)
    if any(w[head].isdecimal() for w in words):
        head = max(0, head - 1)  # a number alone is no name
    tail = next((i for i in range(room - head) if len({w[-1 - i] for w in words}) > 1), room - head)
    first, last = ".".join(words[0][:head]), ".".join(words[0][len(words[0]) - tail :])
    removed = " and ".join([f"“{first}.”"] * bool(first) + [f"“.{last}”"] * bool(last))
    return [
        ".".join(w[head : len(w) - tail]) for w in words
    ], f" Names without their {removed}." if removed else ""
