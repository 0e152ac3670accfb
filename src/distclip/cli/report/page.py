"""The page of `distclip report`: one file with everything in it, that asks for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files

import distclip
from distclip.cli.norm_history import NormHistory
from distclip.cli.number_ranges import format_ranges, number_ranges
from distclip.cli.report.notable import MOST_SKIPS, NotableStep, largest_steps, skipped_steps
from distclip.cli.report.page_data import page_data
from distclip.cli.report.summary import header_facts, main_numbers, run_sentences
from distclip.cli.run_log import RunLog
from distclip.cli.suggest.advice import recommend_max_norm, times
from distclip.cli.suggest.findings import find_findings

_OPEN_CARDS = 3  # more runs than that are folded
_NOTES_SHOWN = 2  # of a step; more are folded
_COLUMNS: list[tuple[str, Callable[[NotableStep], str]]] = [
    ("norm", lambda row: "not finite" if math.isnan(row.norm) else f"{row.norm:.5g}"),
    ("× running median", lambda row: "–" if math.isnan(row.ratio) else f"{times(row.ratio)}"),
    ("layer, its share", lambda row: escape(row.layer) or "–"),
    ("rank", lambda row: escape(row.rank) or "–"),
    ("culprits", lambda row: "<br>".join(map(escape, row.culprits)) or "–"),
    ("notes", lambda row: _folded(row.notes)),
    ("what was done", lambda row: escape(row.done)),
]


def build_page(histories: Sequence[NormHistory]) -> str:
    """The whole HTML text."""
    runs = [history.run for history in histories]
    title = (
        "distclip: "
        + ", ".join(run.name for run in runs[:4])
        + (f" and {len(runs) - 4} more" if len(runs) > 4 else "")
    )
    # "<" is the only character that can end a script
    data = json.dumps(page_data(histories), allow_nan=False).replace("<", "\\u003c")
    scripts = [_asset("uplot.min.js"), _asset("page.js")]
    style = _asset("uplot.min.css") + "\n" + _asset("page.css")
    licence = _asset("uplot.LICENSE.txt").replace("--", "- -")
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_source_hash, scripts))}; "
        f"style-src {_source_hash(style)}"
    )
    cards = "".join(_card(number, history) for number, history in enumerate(histories))
    body = [
        f"<header><h1>What clipping did</h1>{_intro(runs)}</header>",
        f'<section class="cards" aria-label="Runs">{cards}</section>',
        '<div id="figures"></div>',
        "<noscript><p>The figures need JavaScript; the tables below do not.</p></noscript>",
        *(
            _steps_table("Largest steps", number, history, largest_steps(history))
            for number, history in enumerate(histories)
        ),
        *(_skips_table(number, history) for number, history in enumerate(histories)),
        _numbers_table(runs),
        f'<footer class="muted">distclip {escape(distclip.__version__)}; figures drawn by uPlot '
        f"(MIT licence, in the source of this page)</footer>",
    ]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>",
            *body,
            f"<!-- uPlot:\n{licence}-->",
            f'<script type="application/json" id="data">{data}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body>\n</html>\n",
        ]
    )


def _asset(name: str) -> str:
    return (files("distclip.cli.report") / "web" / name).read_text("utf-8")


def _source_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _intro(runs: Sequence[RunLog]) -> str:
    steps = sum(map(len, runs))
    what = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    return f'<p class="muted">{what}, {steps:,} steps</p>'


def _card(number: int, history: NormHistory) -> str:
    run, advice = history.run, recommend_max_norm(history)
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in header_facts(run)
    )
    plan = ""
    if run.headers and run.headers[-1].plan:
        rows = "".join(
            f"<tr><td>{row.parameters:,}</td><td>{row.elements:,}</td><td>{escape(row.description)}"
            f"</td><td>{_ranks(row.ranks)}</td><td>{row.copies}</td></tr>"
            for row in run.headers[-1].plan
        )
        plan = (
            "<details><summary>Who holds what</summary>"
            '<div class="scroll" tabindex="0" role="region" '
            f'aria-label="Who holds what, {escape(run.name)}"><table><thead><tr>'
            '<th scope="col">parameters</th><th scope="col">elements</th><th scope="col">held</th>'
            '<th scope="col">ranks</th><th scope="col">copies</th></tr></thead>'
            f"<tbody>{rows}</tbody></table></div></details>"
        )
    items = "".join(
        f'<li class="warn">{escape(finding.text)}</li>' for finding in find_findings(history)
    )
    items += f"<li>suggested: {escape(advice.setting)}, {escape(advice.reason)}</li>"
    items += "".join(f'<li class="note">{escape(text)}</li>' for text in run.notes)
    inner = "".join(f"<p>{escape(text)}</p>" for text in run_sentences(run))
    inner += f"<ul>{items}</ul>" + (f"<dl>{facts}</dl>" if facts else "") + plan
    return (
        f'<details class="card" data-run="{number}"><summary><h2>{escape(run.name)}</h2></summary>'
        f"{inner}</details>\n"
    ).replace("<details", "<details open", 1 if number < _OPEN_CARDS else 0)


def _ranks(ranks: Sequence[int]) -> str:
    return format_ranges(number_ranges(ranks), ", ")


def _steps_table(
    title: str, number: int, history: NormHistory, rows: Sequence[NotableStep], rest: str = ""
) -> str:
    """A table whose steps are buttons: page.js moves the figures there."""
    name = escape(history.run.name)
    shown = [c for c in _COLUMNS if any(c[1](row) != "–" for row in rows)] or _COLUMNS
    body = "".join(
        f'<tr><th scope="row"><button type="button" class="go" data-run="{number}" '
        f'data-step="{row.step}" aria-label="show step {row.step:,} in the figures">'
        f"{row.step:,}</button></th>"
        + "".join(_cell(label, cell(row)) for label, cell in shown)
        + "</tr>\n"
        for row in rows
    )
    head = "".join(f'<th scope="col">{label}</th>' for label, _ in shown)
    return (
        f'<section><h2>{title}: {name}</h2><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{title}: {name}"><table class="steps"><thead><tr><th scope="col">step</th>'
        f"{head}</tr></thead><tbody>\n{body}</tbody></table></div>{rest}</section>"
    )


def _cell(label: str, html: str) -> str:
    empty = ' class="none"' if html == "–" else ""
    return f'<td{empty} data-label="{label}">{html}</td>'


def _skips_table(number: int, history: NormHistory) -> str:
    rows, total = skipped_steps(history)
    if not rows:
        return ""
    more = total - MOST_SKIPS
    rest = f'<p class="muted">and {more:,} more</p>' if more > 0 else ""
    return _steps_table("Skipped steps", number, history, rows, rest)


def _folded(lines: Sequence[str]) -> str:
    shown = "<br>".join(map(escape, lines[:_NOTES_SHOWN]))
    if len(lines) <= _NOTES_SHOWN:
        return shown or "–"
    more = "<br>".join(map(escape, lines[_NOTES_SHOWN:]))
    return f"{shown}<details><summary>{len(lines) - _NOTES_SHOWN} more</summary>{more}</details>"


def _numbers_table(runs: Sequence[RunLog]) -> str:
    columns = [dict(main_numbers(run)) for run in runs]
    head = "".join(f'<th scope="col">{escape(run.name)}</th>' for run in runs)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        f"{''.join(f'<td>{escape(column[name])}</td>' for column in columns)}</tr>\n"
        for name in columns[0]
    )
    return (
        '<section><h2>Main numbers</h2><div class="scroll" tabindex="0" role="region" '
        f'aria-label="Main numbers"><table><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>\n{body}</tbody></table></div></section>"
    )
