"""The README's chart, from the pages of figures: python docs/speed.py writes docs/speed.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# what stands in the chart: page, name, and case, row and number of ranks there; fast and slow ones
SHOWN = [
    ("results", "GPT-2, fp32", "gpt2", "fp32", 1),
    ("results", "GPT-2, bf16", "gpt2", "bf16", 1),
    ("results", "5,000 small tensors", "small", "fp32", 1),
    ("results", "DDP, 10 tensors, 4 ranks", "ddp", "10 parameters,", 4),
    ("results", "DDP, 1,000 tensors, 4 ranks", "ddp", "1,000 parameters,", 4),
    ("results", "FSDP1, 100 tensors, 4 ranks", "fsdp1", "100 parameters, use_orig_params,", 4),
    ("results", "FSDP2, 1,000 tensors, 4 ranks", "fsdp2", "1,000 parameters,", 4),
    ("results_gpu", "Llama, 1.5e9 elements, fp32", "llama", "fp32", 1),
    ("results_gpu", "Llama, 1.5e9 elements, bf16", "llama", "bf16", 1),
    ("results_gpu", "GPT-2, fp32", "gpt2", "fp32", 1),
    ("results_gpu", "GPT-2, bf16", "gpt2", "bf16", 1),
    ("results_gpu", "5,000 small tensors", "small", "5,000", 1),
    ("results_gpu", "GPT-2, with a GradScaler", "scaler", "gpt2 fp32 %s, in place", 1),
]


class Line(NamedTuple):
    page: str
    name: str
    idle: float  # torch's time divided by distclip's, median: nothing to clip
    active: float  # the same where the threshold is passed


def lines() -> list[Line]:
    pages = {
        page: json.loads((ROOT / "benchmarks" / f"{page}.json").read_text())["rows"]
        for page in ("results", "results_gpu")
    }

    def ratio(page: str, case: str, what: str, ranks: int, state: str) -> float:
        what = what % state if "%s" in what else f"{what} {state}"
        (row,) = [
            row
            for row in pages[page]
            if row["case"] == case and row["what"] == what and row["main"] and row["unit"] == "x"
            and row["kernels"] in ("native", "triton") and row["ranks"] == ranks
        ]  # fmt: skip
        return row["value"]["median"]

    return [
        Line(page, name, *(ratio(page, case, what, ranks, state) for state in ("idle", "active")))
        for page, name, case, what, ranks in SHOWN
    ]


def draw(target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    found = lines()
    machines = {"results": "two CPU cores", "results_gpu": "one H200"}
    figure, all_axes = plt.subplots(
        2, 1, figsize=(8, 4.6), sharex=True, layout="constrained",
        height_ratios=[sum(line.page == page for line in found) for page in machines],
    )  # fmt: skip
    for axes, (page, machine) in zip(all_axes, machines.items()):
        rows = [line for line in found if line.page == page]
        axes.axvspan(0.01, 1, color="#f3e3dc", zorder=0)
        axes.axvline(1, color="#777777", linewidth=1)
        for y, line in enumerate(rows):
            axes.plot([line.idle, line.active], [y, y], color="#bbbbbb", linewidth=2, zorder=1)
        axes.plot(
            [r.idle for r in rows], range(len(rows)), "o", color="#2c6fa3", label="nothing to clip"
        )
        axes.plot([r.active for r in rows], range(len(rows)), "o", color="#c8553d", label="clipped")
        axes.set_yticks(range(len(rows)), [line.name for line in rows])
        axes.invert_yaxis()
        axes.set_title(machine, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xscale("log")
    axes.set_xlim(0.25, 9)
    axes.xaxis.set_major_locator(FixedLocator([0.3, 0.5, 1, 2, 3, 5]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlabel("torch's time / distclip's (right of 1: distclip is faster)")
    all_axes[0].legend(loc="upper right", frameon=False)
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    draw(ROOT / "docs" / "speed.png")
