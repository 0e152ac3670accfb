"""The page of `distclip report`: one self-contained file, readable at any width, in light and
dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

import torch

import distclip
from distclip.cli.report.plotting import SERIES, DrawnFigure
from distclip.cli.run_log import RunLog
from distclip.cli.suggest.thresholds import find_warnings, percentile_of, recommend_max_norm

_MOST_SKIPS = 100  # rows of a table
_DARK_SERIES = (
    "#6cb2f5",
    "#ff9b63",
    "#4fcb9b",
    "#b99aff",
    "#e3b341",
    "#ff86b8",
    "#4ecbe4",
    "#a9b4c0",
)
_LIGHT_VARIABLES = "; ".join(f"--s{i}: {c}" for i, c in enumerate(SERIES))
_DARK_VARIABLES = "; ".join(f"--s{i}: {c}" for i, c in enumerate(_DARK_SERIES))
_STYLE_SHEET = f"""
:root {{ color-scheme: light dark; --page: #ffffff; --card: #f5f7f9; --ink: #1b1f24; \
--muted: #5c6671; --grid: #d4dae1;
  --warn: #8a4b00; {_LIGHT_VARIABLES} }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #14171b; --card: #1d2127; --ink: #e6e9ed; \
--muted: #9aa5b1; --grid: #353c45;
  --warn: #f0b35a; {_DARK_VARIABLES} }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0; background: var(--page); color: var(--ink); \
font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }}
main {{ max-width: 1060px; margin: 0 auto; padding: 16px }}
h1 {{ font-size: 1.5rem; margin: 8px 0 }} h2 {{ font-size: 1.15rem; margin: 32px 0 8px }} \
h3 {{ font-size: 1rem; margin: 0 0 4px }}
p {{ margin: 4px 0 }}
.runs {{ display: grid; gap: 12px; \
grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)) }}
.run {{ background: var(--card); border-radius: 8px; border-left: 4px solid; padding: 12px 16px }}
.run ul {{ margin: 8px 0 0; padding-left: 18px; font-size: .9rem }} \
.warn {{ color: var(--warn) }} .note {{ color: var(--muted) }}
.legend {{ display: flex; flex-wrap: wrap; gap: 2px 18px; padding: 0; margin: 8px 0; \
list-style: none; font-size: .9rem }}
.legend span {{ display: inline-block; width: 22px; height: 4px; border-radius: 2px; \
margin-right: 7px; vertical-align: middle }}
figure {{ margin: 0 }} figcaption, .muted {{ color: var(--muted); font-size: .85rem }}
svg {{ display: block; width: 100%; height: auto }} \
svg text {{ font-family: system-ui, sans-serif }}
svg * {{ stroke-linejoin: round; stroke-linecap: butt }}
svg.narrow {{ display: none; max-width: 560px }}
@media (max-width: 700px) {{ svg.wide {{ display: none }} svg.narrow {{ display: block }} }}
.scroll {{ overflow-x: auto; max-width: 100% }}
table {{ border-collapse: collapse; font-size: .9rem; overflow-wrap: normal }}
th, td {{ padding: 4px 14px 4px 0; text-align: left; vertical-align: top; \
border-bottom: 1px solid var(--grid) }}
.skips td, .skips th {{ min-width: 3.2em; white-space: normal }} \
.skips td:nth-child(n + 2) {{ min-width: 7.5em; overflow-wrap: anywhere }}
td {{ font-variant-numeric: tabular-nums }} thead th {{ white-space: nowrap }}
@media (max-width: 700px) {{ table {{ font-size: .8rem }} th, td {{ padding-right: 9px }} }}
"""


def build_page(runs: Sequence[RunLog], drawn: Sequence[DrawnFigure]) -> str:
    """The whole HTML text."""
    title = (
        "distclip: "
        + ", ".join(run.name for run in runs[:4])
        + (f" and {len(runs) - 4} more" if len(runs) > 4 else "")
    )
    cards = "".join(_run_card(i, run) for i, run in enumerate(runs))
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{_STYLE_SHEET}</style>\n</head>\n<body>\n<main>",
            f'<h1>What clipping did</h1>\n<div class="runs">\n{cards}</div>',
            *(_figure_html(figure, runs) for figure in drawn),
            f"<h2>Main numbers</h2>\n{_numbers_table(runs)}",
            *(_skips_table(run) for run in runs if run.skips),
            f'<p class="muted">distclip {distclip.__version__}</p>\n</main>\n</body>\n</html>\n',
        ]
    )


def _run_card(i: int, run: RunLog) -> str:
    advice = recommend_max_norm(run)
    suggested = f"<li>suggested: {advice.setting}, {escape(advice.reason)}</li>"
    items = (
        "".join(f'<li class="warn">{escape(text)}</li>' for text in find_warnings(run)) + suggested
    )
    items += "".join(f'<li class="note">{escape(text)}</li>' for text in run.notes)
    paragraphs = "".join(f"<p>{escape(text)}</p>" for text in run_summary(run))
    colour = f"border-left-color: var(--s{i % len(SERIES)})"
    return (
        f'<section class="run" style="{colour}">'
        f'<h2 style="margin-top: 0">{escape(run.name)}</h2>'
        f"{paragraphs}<ul>{items}</ul></section>\n"
    )


def run_summary(run: RunLog) -> Iterable[str]:
    """The run in plain words."""
    steps, rate = len(run.step), float(run.clipped.double().mean())
    limits = [limit for limit in run.limits if math.isfinite(limit)]
    known = run.threshold[run.threshold.isfinite()]
    if not limits:
        what = "No threshold was set: it only measured."
    elif len(set(limits)) > 1:
        what = (
            f"{rate:.1%} were clipped; {len(limits)} groups have thresholds from "
            f"{min(limits):.4g} to {max(limits):.4g}."
        )
    elif len(known) and float(known.max()) > float(known.min()):
        what = (
            f"{rate:.1%} were clipped, to a threshold between {float(known.min()):.4g} and "
            f"{float(known.max()):.4g}."
        )
    elif run.clamps:
        what = f"At {rate:.1%} elements were clamped to ±{limits[0]:.4g}."
    else:
        where = " in each group" if len(limits) > 1 else ""
        what = f"{rate:.1%} were clipped, to a norm of {limits[0]:.4g}{where}."
    skipped = int(run.skipped.sum())
    left = (
        "None was skipped."
        if not skipped
        else f"{skipped} {'was' if skipped == 1 else 'were'} skipped."
    )
    yield f"{steps:,} step{'s' if steps > 1 else ''}. {what} {left}"
    norms = run.norm[run.finite]
    if len(norms):
        at = int(torch.where(run.finite, run.norm, -1.0).argmax())
        yield (
            f"Norm before clipping: median {_median_norm(norms):.4g}, "
            f"largest {_largest_norm(norms):.4g} (step {int(run.step[at]):,})."
        )
    else:
        yield "No norm is finite."


def _median_norm(norms: torch.Tensor) -> float:
    return percentile_of(norms, 50)


def _largest_norm(norms: torch.Tensor) -> float:
    return float(norms.max())


def _figure_html(figure: DrawnFigure, runs: Sequence[RunLog]) -> str:
    items = "".join(
        f'<li><span style="background: var(--s{i % len(SERIES)})"></span>{escape(run.name)}</li>'
        for i, run in enumerate(runs)
    )
    own = not figure.name.startswith(("groups-", "layers-")) and len(runs) > 1
    legend = f'<ul class="legend">{items}</ul>' if own else ""
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>"
    return f"<h2>{escape(figure.title)}</h2>\n<figure>{legend}\n{figure.svg}\n{caption}</figure>"


def _numbers_table(runs: Sequence[RunLog]) -> str:
    rows: list[tuple[str, list[str]]] = [
        ("steps", [f"{len(run.step):,}" for run in runs]),
        ("first and last step", [f"{int(run.step[0]):,} – {int(run.step[-1]):,}" for run in runs]),
        ("clipped", [f"{float(run.clipped.double().mean()):.2%}" for run in runs]),
        ("clipped, of the last 500 steps", [f"{float(run.clip_rate[-1]):.2%}" for run in runs]),
        ("skipped", [f"{int(run.skipped.sum()):,}" for run in runs]),
        ("norm not finite", [f"{int((~run.finite).sum()):,}" for run in runs]),
        ("median norm", [_norm_text(run, _median_norm) for run in runs]),
        ("largest norm", [_norm_text(run, _largest_norm) for run in runs]),
        ("norm type p", [f"{run.norm_type:g}" for run in runs]),
        ("last threshold", [_limits_text(run.limits) for run in runs]),
        ("smallest coefficient of a step that was taken", [_smallest_coef(run) for run in runs]),
        ("groups", [f"{max(1, len(run.groups)):,}" for run in runs]),
    ]
    head = "".join(f'<th scope="col">{escape(run.name)}</th>' for run in runs)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        f"{''.join(f'<td>{escape(v)}</td>' for v in values)}</tr>\n"
        for name, values in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Main numbers">'
        f"<table><thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>\n{body}</tbody></table></div>"
    )


def _norm_text(run: RunLog, number: Callable[[torch.Tensor], float]) -> str:
    norms = run.norm[run.finite]
    return f"{number(norms):.5g}" if len(norms) else "–"


def _limits_text(limits: Sequence[float]) -> str:
    finite = [limit for limit in limits if math.isfinite(limit)]
    if not finite:
        return "none"
    return f"{finite[0]:.4g}" if len(set(finite)) == 1 else f"{min(finite):.4g} – {max(finite):.4g}"


def _smallest_coef(run: RunLog) -> str:
    taken = run.coef[run.coef.isfinite() & ~run.skipped]
    return f"{float(taken.min()):.4g}" if len(taken) else "–"


def _skips_table(run: RunLog) -> str:
    rows = "".join(
        f"<tr><td>{skip.step:,}</td><td>{escape(_skip_reason(skip.nonfinite, skip.norm))}</td>"
        f"<td>{'<br>'.join(map(escape, skip.culprits)) or '–'}</td></tr>\n"
        for skip in run.skips[:_MOST_SKIPS]
    )
    more = len(run.skips) - _MOST_SKIPS
    rest = f'<p class="muted">and {more:,} more</p>' if more > 0 else ""
    return (
        f"<h2>{escape(run.name)}: skipped steps</h2>\n"
        f'<div class="scroll" tabindex="0" role="region" '
        f'aria-label="Skipped steps of {escape(run.name)}">'
        f'<table class="skips"><thead><tr><th scope="col">step</th><th scope="col">why</th>'
        f'<th scope="col">culprits, named at the first of a streak</th></tr></thead>'
        f"<tbody>\n{rows}</tbody></table></div>{rest}"
    )


def _skip_reason(nonfinite: int, norm: float) -> str:
    if nonfinite:
        return (
            "1 gradient is not finite"
            if nonfinite == 1
            else f"{nonfinite} gradients are not finite"
        )
    return (
        "the norm is not finite" if math.isnan(norm) else f"left out by the policy: norm {norm:.5g}"
    )
