"""The figures as PNG, by matplotlib, for papers and issues. Names are drawn as they are."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distclip.cli.glyphs import families_for, shorten_name
from distclip.cli.norm_history import NormHistory
from distclip.cli.part_shares import PartShares
from distclip.cli.report.page_data import merged_columns, power_name, short_labels
from distclip.cli.report.thinning import kept_positions
from distclip.cli.run_log import RunLog

_COLOURS = ("#0f5fa9", "#b8390a", "#0f7353", "#7a2ff0", "#8a5300", "#be185e", "#0b6b86", "#57606b")
_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 2, 2)))
_SIZE_INCHES, _DPI = (10.4, 4.0), 110
_RC_PARAMS: dict[Any, Any] = {
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "#d9dfe5",
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.linewidth": 1.1,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ is a part of a name
}
_MOST_POINTS = 3000  # of a line
_TITLE_COLUMNS = 72  # columns of the widest letters that fit into a picture's title
_DRAWABLE = (1e-150, 1e150)  # matplotlib's margins overflow beyond
_HEAT_ROWS, _HEAT_COLUMNS = 24, 800


def draw_pictures(histories: Sequence[NormHistory]) -> tuple[dict[str, bytes], list[str]]:
    """Name → PNG, and notes on characters that could not be drawn."""
    runs = [history.run for history in histories]
    names = {run.name for run in runs} | {name for run in runs for name in run.part_names}
    families, unknown = families_for(names)
    lines: list[tuple[str, str, str, Callable[[RunLog], Any], bool]] = [
        ("norm", "Gradient norm before clipping", "norm", lambda run: run.norm, True),
        ("coefficient", "Clip coefficient", "coefficient", lambda run: run.coef, True),
        ("clip_rate", "Clip rate", "clipped steps (%)", lambda run: 100 * run.clip_rate, False),
    ]
    if any(bool((run.cosine < 0.9999).any()) for run in runs):
        title = "Cosine between raw and clipped gradient"
        lines.append(("cosine", title, "cosine", lambda run: run.cosine, False))
    out: dict[str, bytes] = {}
    with matplotlib.rc_context({**_RC_PARAMS, "font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # once a glyph and figure
        for name, title, label, of, log in lines:
            out[name] = _line_picture(histories, title, label, of, log)
        for number, run in enumerate(runs):
            for parts in run.parts:
                out[f"{parts.kind}s-{number + 1}"] = _heat_picture(run, parts)
    note = f"no font here has {shorten_name(unknown, 40)}: boxes stand for them in the PNGs"
    return out, [f"{note}; the page shows them"] if unknown else []


def _line_picture(
    histories: Sequence[NormHistory], title: str, label: str, of: Callable[[RunLog], Any], log: bool
) -> bytes:
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes, drawn = figure.subplots(), False
    most = max(200, _MOST_POINTS // len(histories))
    for i, history in enumerate(histories):
        run, at = history.run, kept_positions(history, most)
        style: dict[str, Any] = {
            "color": _COLOURS[i % len(_COLOURS)],
            "ls": _DASHES[i // len(_COLOURS) % len(_DASHES)],
        }
        y = np.where(run.finite, of(run), np.nan)[at]
        if log:
            y = np.where(y > 0, y, np.nan).clip(*_DRAWABLE)
        drawn = drawn or bool(np.isfinite(y).any())
        few = "." if np.isfinite(y).sum() < 40 else None
        axes.plot(
            run.step[at], y, marker=few, label=shorten_name(run.name, _TITLE_COLUMNS), **style
        )
        if label == "norm":
            _add_marks(axes, run, at, style["color"])
    if log and drawn:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set(xlabel="step", ylabel=label, title=title)
    if len(histories) > 1:
        _add_legend(figure, axes)
    return _png(figure)


def _add_marks(axes: Any, run: RunLog, at: Any, colour: str) -> None:
    """The threshold, and × at the top where a norm was not finite."""
    limit = run.threshold[at]
    if not run.clamps and len(run.groups) <= 1 and np.isfinite(limit).any():
        axes.plot(run.step[at], limit, color=colour, ls=(0, (5, 3)), lw=1.3, drawstyle="steps-mid")
    gone = run.step[at][~run.finite[at]]
    if len(gone):
        axes.plot(
            gone,
            np.full(len(gone), 0.99),
            "x",
            color=colour,
            ms=5,
            transform=axes.get_xaxis_transform(),
        )


def _heat_picture(run: RunLog, parts: PartShares) -> bytes:
    rows = np.sort(np.argsort(-parts.largest, kind="stable")[:_HEAT_ROWS])
    first, last, shares = merged_columns(parts, rows, _HEAT_COLUMNS)
    figure = Figure(figsize=(_SIZE_INCHES[0], 1.4 + 0.2 * len(rows)), layout="constrained")
    axes = figure.subplots()
    middle = (first[1:] + last[:-1]) / 2
    edges = np.concatenate([[first[0] - 0.5], middle, [last[-1] + 0.5]])
    shown = np.ma.masked_invalid(100 * np.where(np.isinf(shares), np.nan, shares).T)
    image = axes.pcolormesh(edges, np.arange(len(rows) + 1) - 0.5, shown, vmin=0, vmax=100)
    lost = np.ma.masked_where(~np.isinf(shares.T), np.ones(shares.T.shape))
    axes.pcolormesh(
        edges,
        np.arange(len(rows) + 1) - 0.5,
        lost,
        cmap=ListedColormap(["#d6006c"]),
    )
    labels, _ = short_labels([parts.names[i] for i in rows])
    axes.set(
        yticks=range(len(rows)),
        yticklabels=[shorten_name(label, 30) for label in labels],
        xlabel="step",
        title=shorten_name(f"{run.name}: which {parts.kind} dominates", _TITLE_COLUMNS),
    )
    axes.invert_yaxis()
    axes.grid(False)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    figure.colorbar(image, ax=axes, pad=0.01, label=f"share of the {power_name(run.norm_type)} (%)")
    return _png(figure)


def _add_legend(figure: Any, axes: Any, columns: int = 4) -> None:
    """Below the figure, which grows by its height; in as many columns as fit."""
    lines, names = axes.get_legend_handles_labels()
    legend = figure.legend(lines, names, loc="outside lower center", ncols=min(columns, len(names)))
    box = legend.get_window_extent()
    if box.width > figure.bbox.width and columns > 1:
        legend.remove()
        _add_legend(figure, axes, columns - 1)
    else:
        figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)


def _png(figure: Any) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=_DPI, facecolor="white")
    return picture.getvalue()
