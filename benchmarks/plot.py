"""The ratios as one picture: a point for each main comparison and kernel, quartiles as a line, the
floor as a tick."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.records import Row

COLORS = {"torch": "#4477aa", "native": "#cc6633"}


def label(row: Row) -> str:
    return f"{row.case}: {row.what}{f', {row.ranks} ranks' if row.ranks > 1 else ''}"


def draw(rows: Sequence[Row], target: Path) -> None:
    """Writes `target` (PNG, SVG or PDF by its name).

    Raises:
        SystemExit: matplotlib is missing, or no comparison is there.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit(
            "benchmarks: --plot needs matplotlib: pip install 'distclip[report]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    shown = [row for row in rows if row.main and row.unit == "x"]
    if not shown:
        raise SystemExit("benchmarks: --plot shows comparisons with a peer, and none was measured")
    labels = list(dict.fromkeys(map(label, shown)))
    kernels = list(dict.fromkeys(row.kernels for row in shown))
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.27 * len(labels)), layout="constrained")
    for row in shown:
        shift = 0.16 * (2 * kernels.index(row.kernels) - len(kernels) + 1)
        y = labels.index(label(row)) + shift
        color = COLORS.get(row.kernels, "#228833")
        axes.plot(
            [row.value.q1, row.value.q3], [y, y], color=color, linewidth=2.2, solid_capstyle="butt"
        )
        axes.plot(row.value.median, y, "o", color=color, markersize=4.5)
        if row.issue and row.floor is not None:
            axes.plot(
                row.floor,
                y,
                marker="|",
                color="#222222",
                markersize=9,
                markeredgewidth=1.8,
                zorder=5,
            )
    axes.axvline(1, color="#888888", linewidth=1)
    axes.set_xscale("log")
    low, high = (
        min(row.value.q1 for row in shown),
        max(max(row.value.q3, row.floor or 0) for row in shown),
    )
    axes.set_xlim(min(0.8, low * 0.93), high * 1.1)
    ticks = [
        t
        for t in (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500)
        if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]
    ]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    for i, text in enumerate(labels[1:], 1):
        if text.split(":")[0] != labels[i - 1].split(":")[0]:
            axes.axhline(i - 0.5, color="#bbbbbb", linewidth=0.7)
    axes.set_xlabel("times faster than the peer (log scale; right of 1: distclip is faster)")
    handles = [
        Line2D(
            [],
            [],
            color=COLORS.get(k, "#228833"),
            marker="o",
            label=f"{k} kernels, median and quartiles",
        )
        for k in kernels
    ]
    handles.append(
        Line2D(
            [],
            [],
            color="#222222",
            marker="|",
            markersize=9,
            markeredgewidth=1.8,
            linestyle="",
            label="floor",
        )
    )
    figure.legend(
        handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8
    )
    figure.savefig(target, dpi=130)
    plt.close(figure)
