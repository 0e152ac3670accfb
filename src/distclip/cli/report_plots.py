"""The figures of `distclip report`, each drawn three times: wide and narrow as SVG for the page, and as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from distclip.cli.runs import Parts, Run, RunError
from distclip.cli.svg import inline

INK, MUTED, GRID = "#1b1f24", "#5c6671", "#d4dae1"
SERIES = ("#0f5fa9", "#c2410d", "#12805d", "#8a3ffd", "#a16208", "#be185e", "#0e7491", "#57606b")
COLOURS = {"ink": INK, "muted": MUTED, "grid": GRID, **{f"s{i}": colour for i, colour in enumerate(SERIES)}}
_WIDE, _NARROW = (10.4, 3.7), (3.6, 3.0)  # inches
_STEP = "step (optimizer steps)"
_POINTS = 3000  # drawn in a figure, shared by its runs
_RULES: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 9, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK, "xtick.color": MUTED,
    "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": GRID, "grid.linewidth": 0.6, "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "lines.linewidth": 1.1, "savefig.transparent": True,
    "legend.frameon": False, "svg.hashsalt": "distclip",
}  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """One figure."""

    name: str  # of its PNG
    title: str
    caption: str
    svg: str  # the wide and the narrow one, of which CSS shows one
    png: bytes


@dataclass(frozen=True)
class _Plan:
    """What is to be drawn: `draw(figure, room)` with room in inches of width."""

    name: str
    title: str
    caption: str
    draw: Callable[[Any, float], None]
    runs: Sequence[Run]
    height: float = 1.0  # times the usual one


def colour(index: int) -> str:
    return SERIES[index % len(SERIES)]


def figures(runs: Sequence[Run]) -> list[Drawn]:
    """All figures that these runs have the numbers for.

    Raises:
        RunError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RunError('figures need matplotlib: pip install "distclip[report]"') from error
    with matplotlib.rc_context(_RULES):
        return [_drawn(plan, Figure) for plan in _plans(runs)]


def _drawn(plan: _Plan, figure_class: Any) -> Drawn:
    label = f"{plan.title}. {plan.caption}"
    svgs: list[str] = []
    for css_class, (width, height) in (("wide", _WIDE), ("narrow", _NARROW)):
        figure = figure_class(figsize=(width, height * plan.height), layout="constrained")
        plan.draw(figure, width)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        svgs.append(inline(file.getvalue(), f"{plan.name}-{css_class}", css_class, label, COLOURS))
    figure = figure_class(figsize=(_WIDE[0], _WIDE[1] * plan.height + 0.5), layout="constrained")
    plan.draw(figure, _WIDE[0])
    figure.suptitle(plan.title, fontsize=11)
    if len(plan.runs) > 1:
        lines = [figure.axes[0].plot([], [], color=colour(i), lw=2)[0] for i in range(len(plan.runs))]
        figure.legend(lines, [run.name for run in plan.runs], loc="outside lower center", ncols=min(4, len(plan.runs)))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, transparent=False, facecolor="white")
    return Drawn(plan.name, plan.title, plan.caption, "\n".join(svgs), picture.getvalue())


def _plans(runs: Sequence[Run]) -> list[_Plan]:
    p = f"{runs[0].norm_type:g}"
    marks = "Dashed: the threshold, where it is one of this norm. ×: a step whose norm was not finite. "
    strip = "The strip below is filled where steps were clipped (higher: more of them), × where one was skipped."
    plans = [
        _Plan("norm", f"Gradient norm before clipping (p = {p})", marks + strip, lambda f, w: _norm(f, w, runs), runs, 1.15),
        _Plan(
            "coefficient", "Clip coefficient", "What the gradients were multiplied by; of several groups the smallest. 1: not clipped.",
            lambda f, w: _lines(f, w, runs, lambda run: run.coef, "coefficient (factor)", log=True), runs,
        ),
        _Plan(
            "clip_rate", "Clip rate", "Share of the last 500 steps (from the start: of all so far) that were clipped.",
            lambda f, w: _lines(f, w, runs, lambda run: 100 * run.clip_rate, "clipped steps (%)", (-3, 103)), runs,
        ),
    ]  # fmt: skip
    if any(bool((run.cosine < 0.9999).any()) for run in runs):
        caption = "How far value clipping bends the direction; of several groups the smallest. 1: not at all."
        draw: Callable[[Any, float], None] = lambda f, w: _lines(f, w, runs, lambda r: r.cosine, "cosine", (-0.03, 1.03))  # noqa: E731
        plans.append(_Plan("cosine", "Cosine between raw and clipped gradient", caption, draw, runs))
    for i, run in enumerate(runs):
        for parts in run.parts:
            what = "squared norm" if run.norm_type == 2 else "norm to the power p" if math.isfinite(run.norm_type) else "largest norm"
            shown = f" The largest {_rows(_WIDE[0])} of {len(parts.names)}." if len(parts.names) > _rows(_WIDE[0]) else ""
            caption = f"Share of the {what} by {parts.kind}, over the steps. Bright: it dominates.{shown}"
            rows = min(len(parts.names), _rows(_WIDE[0]) + 1)
            height = max(0.7, 0.25 + rows * 0.055)
            title = f"{run.name}: which {parts.kind} dominates"
            plans.append(_Plan(f"{parts.kind}s-{i + 1}", title, caption, _heat(run, parts), [run], height))
    return plans


def _norm(figure: Any, room: float, runs: Sequence[Run]) -> None:
    import numpy as np

    strip = min(0.22 * len(runs), 1.6) + 0.1
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[figure.get_figheight() - strip, strip])
    _curves(top, room, runs, lambda run: run.norm, log=True)
    for i, run in enumerate(runs):
        if not run.clamps and len(run.groups) <= 1:
            x, y = _known(run, run.threshold)
            top.plot(*_thinned(x, y, _budget(runs, room)), color=colour(i), ls=(0, (5, 3)), lw=1.3, drawstyle="steps-mid")
        gone = _spread(run.step[~run.finite].numpy(), _budget(runs, room))
        if len(gone):
            marks = top.plot(gone, [0.98] * len(gone), "x", color=colour(i), ms=5, mew=1.4, transform=top.get_xaxis_transform())
            marks[0].set(clip_on=False, in_layout=False)
        x, share = _shares(run, _budget(runs, room))
        row = len(runs) - 1 - i
        below.fill_between(x, row, row + 0.8 * np.where(share > 0, np.maximum(share, 0.3), 0), step="mid", color=colour(i), lw=0)
        left = _spread(run.step[run.skipped].numpy(), _budget(runs, room))
        below.plot(left, [row + 0.4] * len(left), "x", color=INK, ms=4, mew=1.2)
    top.set_ylabel("norm (unit of the gradients)")
    below.set(ylim=(-0.15, len(runs)), yticks=[len(runs) / 2 - 0.1], yticklabels=["clipped"], xlabel=_STEP)
    below.tick_params(axis="y", length=0)
    below.grid(False)
    below.spines["left"].set_visible(False)


def _lines(
    figure: Any, room: float, runs: Sequence[Run], of: Callable[[Run], Any], label: str, limits: Any = None, log: bool = False
) -> None:
    axes = figure.subplots()
    _curves(axes, room, runs, of, log)
    axes.set(xlabel=_STEP, ylabel=label, **({"ylim": limits} if limits else {}))


def _curves(axes: Any, room: float, runs: Sequence[Run], of: Callable[[Run], Any], log: bool) -> None:
    """One line a run: min and max of each stretch where there are more steps than can be told apart."""
    import numpy as np

    positive = False
    for i, run in enumerate(runs):
        values = of(run)
        # gaps where the norm is not finite; other lines of a log may lack a number, and the line goes on over them
        keep = values.isfinite() | ~run.finite
        x, y = run.step[keep].numpy(), np.where(run.finite[keep], values[keep], np.nan)
        if log:
            y = np.where(y > 0, y, np.nan)
        positive = positive or bool(np.isfinite(y).any())
        x, y = _thinned(x, y, _budget(runs, room))
        axes.plot(x, y, color=colour(i), marker="." if np.isfinite(y).sum() < 40 else None)
    if log and positive:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_tick)
        axes.yaxis.set_minor_formatter(_no_tick)
        low, high = axes.get_ylim()
        if high / low < 10:  # else there may be no labelled tick at all
            axes.set_ylim(low / 2, high * 1.3)
            axes.yaxis.set_minor_formatter(_tick_at_2_and_5)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=5 if room < 5 else 10)


def _tick(value: float, _: object = None) -> str:
    return f"{value:g}".replace("e+", "e").replace("e-0", "e-")


def _tick_at_2_and_5(value: float, _: object = None) -> str:
    return _tick(value) if f"{value:e}"[0] in "25" else ""


def _no_tick(value: float, _: object = None) -> str:
    return ""


def _budget(runs: Sequence[Run], room: float) -> int:
    """Stretches of a line."""
    return max(60, int(_POINTS * room / _WIDE[0] / 2 / len(runs)))


def _known(run: Run, values: Any) -> tuple[Any, Any]:
    known = values.isfinite()
    return run.step[known].numpy(), values[known].numpy()


def _thinned(x: Any, y: Any, stretches: int) -> tuple[Any, Any]:
    """At most the lowest and highest point of each stretch, and a gap where one is in it."""
    import numpy as np

    if len(x) <= 2 * stretches:
        return x, y
    kept: list[int] = []
    for a, b in pairwise(np.linspace(0, len(x), stretches + 1).astype(int)):
        known = np.isfinite(y[a:b])
        found = {a + int(np.argmin(known))} if not known.all() else set[int]()
        if known.any():
            found |= {a + int(np.nanargmin(y[a:b])), a + int(np.nanargmax(y[a:b]))}
        kept += sorted(found)
    return x[kept], y[kept]


def _shares(run: Run, stretches: int) -> tuple[Any, Any]:
    """Steps, and the share of clipped ones in the stretch of each."""
    import numpy as np

    x, clipped = run.step.numpy(), run.clipped.double().numpy()
    if len(x) <= 2 * stretches:
        return x, clipped
    edges = np.linspace(0, len(x), stretches + 1).astype(int)
    return x[(edges[:-1] + edges[1:]) // 2], np.array([clipped[a:b].mean() for a, b in pairwise(edges)])


def _spread(steps: Any, most: int) -> Any:
    """At most so many of them, evenly."""
    import numpy as np

    return steps if len(steps) <= most else steps[np.linspace(0, len(steps) - 1, most).astype(int)]


def _rows(room: float) -> int:
    return 24 if room > 5 else 10


def _heat(run: Run, parts: Parts) -> Callable[[Any, float], None]:
    def draw(figure: Any, room: float) -> None:
        import numpy as np

        most, columns = _rows(room), 240 if room > 5 else 120
        scaled = parts.norms / parts.norms.amax(1, keepdim=True)
        p = run.norm_type
        powers = (scaled.pow(p) if math.isfinite(p) else scaled).numpy()
        shares = 100 * (powers / powers.sum(1, keepdims=True) if math.isfinite(p) else powers)
        order = (
            np.argsort(-np.nan_to_num(np.nanmean(shares, 0)))[:most] if np.isfinite(shares).any() else np.arange(most)[: len(parts.names)]
        )
        order = np.sort(order)
        names = [_short(parts.names[i], 28 if room > 5 else 14) for i in order]
        table = shares[:, order]
        if len(order) < len(parts.names):
            table = np.column_stack([table, np.delete(shares, order, 1).sum(1)])
            names.append(f"{len(parts.names) - len(order)} others")
        steps = parts.steps.numpy()
        at = np.linspace(steps[0], steps[-1], min(columns, len(steps)))
        table = table[np.searchsorted(steps, at, side="right") - 1]
        axes = figure.subplots()
        ends = (steps[0] - 0.5, steps[-1] + 0.5, len(names) - 0.5, -0.5)
        image = axes.imshow(table.T, aspect="auto", extent=ends, cmap="viridis", vmin=0, interpolation="none")
        axes.set(yticks=range(len(names)), yticklabels=names, xlabel=_STEP)
        axes.tick_params(axis="y", labelsize=7.5 if room > 5 else 7)
        axes.grid(False)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=4 if room < 5 else 10)
        where = {"location": "top", "aspect": 40} if room < 5 else {"pad": 0.01}
        figure.colorbar(image, ax=axes, label="share (%)", **where)

    return draw


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[len(name) - most // 2 :]}"
