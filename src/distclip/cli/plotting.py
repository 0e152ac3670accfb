"""How a figure becomes SVG for the page, wide and narrow, and a PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from distclip.cli.runs import Run
from distclip.cli.svg import inline

INK, MUTED, GRID = "#1b1f24", "#5c6671", "#d4dae1"
SERIES = ("#0f5fa9", "#c2410d", "#12805d", "#8a3ffd", "#a16208", "#be185e", "#0e7491", "#57606b")
COLOURS = {"ink": INK, "muted": MUTED, "grid": GRID, **{f"s{i}": colour for i, colour in enumerate(SERIES)}}
STEP = "step (optimizer steps)"
_WIDE, _NARROW = (10.4, 3.7), (3.6, 3.0)  # inches
_RULES: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 9, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK, "xtick.color": MUTED,
    "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": GRID, "grid.linewidth": 0.6, "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "lines.linewidth": 1.1, "savefig.transparent": True,
    "legend.frameon": False, "svg.hashsalt": "distclip",
}  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """A figure to be drawn: `draw(figure, wide)`."""

    name: str
    title: str
    caption: str
    draw: Callable[[Any, bool], None]
    runs: Sequence[Run]
    height: float = 1.0  # times the usual one


@dataclass(frozen=True)
class Drawn:
    """One figure."""

    name: str  # of its PNG
    title: str
    caption: str
    svg: str  # the wide and the narrow one, of which CSS shows one
    png: bytes


def colour(index: int) -> str:
    return SERIES[index % len(SERIES)]


def whole_steps(axes: Any, wide: bool) -> None:
    """Whole numbers below the axis, as many as there is room for."""
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=10 if wide else 4)


def drawn(plans: Sequence[Planned]) -> list[Drawn]:
    """All of them."""
    with matplotlib.rc_context(_RULES):
        return [_drawn(plan) for plan in plans]


def _drawn(plan: Planned) -> Drawn:
    label = f"{plan.title}. {plan.caption}"
    svgs: list[str] = []
    for css_class, (width, height) in (("wide", _WIDE), ("narrow", _NARROW)):
        figure = Figure(figsize=(width, height * plan.height), layout="constrained")
        plan.draw(figure, css_class == "wide")
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        svgs.append(inline(file.getvalue(), f"{plan.name}-{css_class}", css_class, label, COLOURS))
    figure = Figure(figsize=(_WIDE[0], _WIDE[1] * plan.height + 0.5), layout="constrained")
    plan.draw(figure, True)
    figure.suptitle(plan.title, fontsize=11)
    if len(plan.runs) > 1:
        lines = [figure.axes[0].plot([], [], color=colour(i), lw=2)[0] for i in range(len(plan.runs))]
        figure.legend(lines, [run.name for run in plan.runs], loc="outside lower center", ncols=min(4, len(plan.runs)))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, transparent=False, facecolor="white")
    return Drawn(plan.name, plan.title, plan.caption, "\n".join(svgs), picture.getvalue())
