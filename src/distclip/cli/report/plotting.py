"""How a figure becomes SVG for the page, wide and narrow, and a PNG."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from distclip.cli.glyphs import families_for, shorten_name
from distclip.cli.report.svg import inline_svg
from distclip.cli.run_log import RunLog

INK, MUTED, GRID = "#1b1f24", "#5c6671", "#d4dae1"
SERIES = ("#0f5fa9", "#c2410d", "#12805d", "#8a3ffd", "#a16208", "#be185e", "#0e7491", "#57606b")
COLOURS = {
    "ink": INK,
    "muted": MUTED,
    "grid": GRID,
    **{f"s{i}": colour for i, colour in enumerate(SERIES)},
}
STEP_LABEL = "step (optimizer steps)"
_WIDE_SIZE, _NARROW_SIZE = (10.4, 3.7), (3.6, 3.0)  # inches
_RC_PARAMS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.linewidth": 1.1,
    "savefig.transparent": True,
    "legend.frameon": False,
    "svg.hashsalt": "distclip",
    "text.parse_math": False,  # a $ is a part of a name
}
_PNG_COLUMNS = 72  # columns of the widest letters that fit into a PNG's title


@dataclass(frozen=True)
class PlannedFigure:
    """A figure to be drawn: `draw(figure, wide)`."""

    name: str
    title: str
    caption: str
    draw: Callable[[Any, bool], None]
    runs: Sequence[RunLog]
    height: float = 1.0  # times the default height


@dataclass(frozen=True)
class DrawnFigure:
    """One figure."""

    name: str  # of its PNG
    title: str
    caption: str
    svg: str  # the wide and the narrow one, of which CSS shows one
    png: bytes


def series_colour(index: int) -> str:
    return SERIES[index % len(SERIES)]


def whole_steps(axes: Any, wide: bool) -> None:
    """Integer ticks on the x axis, as many as fit."""
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=10 if wide else 4)


def draw_plans(plans: Sequence[PlannedFigure]) -> tuple[list[DrawnFigure], str]:
    """All figures, and the characters of names for which this machine has no font: boxes in the
    PNGs, shown as they are by the page."""
    runs = [run for plan in plans for run in plan.runs]
    names = {run.name for run in runs} | {
        name for run in runs for parts in run.parts for name in parts.names
    }
    families, unknown = families_for(names)
    with matplotlib.rc_context({**_RC_PARAMS, "font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # once a glyph and figure
        return [_draw_plan(plan) for plan in plans], unknown


def _draw_plan(plan: PlannedFigure) -> DrawnFigure:
    label = f"{plan.title}. {plan.caption}"
    svgs: list[str] = []
    for css_class, (width, height) in (("wide", _WIDE_SIZE), ("narrow", _NARROW_SIZE)):
        figure = Figure(figsize=(width, height * plan.height), layout="constrained")
        plan.draw(figure, css_class == "wide")
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        svgs.append(
            inline_svg(file.getvalue(), f"{plan.name}-{css_class}", css_class, label, COLOURS)
        )
    figure = Figure(
        figsize=(_WIDE_SIZE[0], _WIDE_SIZE[1] * plan.height + 0.3), layout="constrained"
    )
    plan.draw(figure, True)
    figure.suptitle(shorten_name(plan.title, _PNG_COLUMNS), fontsize=11)
    if len(plan.runs) > 1:
        _add_legend(figure, [shorten_name(run.name, _PNG_COLUMNS) for run in plan.runs])
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, transparent=False, facecolor="white")
    return DrawnFigure(plan.name, plan.title, plan.caption, "\n".join(svgs), picture.getvalue())


def _add_legend(figure: Any, names: Sequence[str], columns: int = 4) -> None:
    """Below the figure, which grows by its height; in as many columns as fit."""
    lines = [
        figure.axes[0].plot([], [], color=series_colour(i), lw=2)[0] for i in range(len(names))
    ]
    legend = figure.legend(lines, names, loc="outside lower center", ncols=min(columns, len(names)))
    box = legend.get_window_extent()
    if box.width > figure.bbox.width and columns > 1:
        legend.remove()
        _add_legend(figure, names, columns - 1)
    else:
        figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)
