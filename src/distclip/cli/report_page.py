"""`distclip report RUN...`: one page with the figures of one or several runs, and the figures as PNG."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from distclip.cli.runs import RunError, read_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a file that JSONLSink wrote, or a folder of them")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="the page (default: report.html)")
    parser.add_argument("--png", metavar="FOLDER", help="where the figures go as PNG (default: beside the page)")


def run(options: argparse.Namespace) -> int:
    """0, or 2 if matplotlib is missing, a log cannot be used or a file cannot be written."""
    output = Path(options.output)
    folder = Path(options.png) if options.png else output.parent
    try:
        from distclip.cli.report_html import page
        from distclip.cli.report_plots import figures
    except ImportError:
        print('distclip report: figures need matplotlib: pip install "distclip[report]"', file=sys.stderr)
        return 2
    try:
        runs = read_runs(options.runs)
        for place in (output.parent, folder):
            place.mkdir(parents=True, exist_ok=True)
        drawn = figures(runs)
        output.write_text(page(runs, drawn), encoding="utf-8")
        pictures = [folder / f"{output.stem}-{figure.name}.png" for figure in drawn]
        for path, figure in zip(pictures, drawn, strict=True):
            path.write_bytes(figure.png)
    except (RunError, OSError) as error:
        print(f"distclip report: {error}", file=sys.stderr)
        return 2
    for one in runs:
        for note in one.notes:
            print(f"note: {note}", file=sys.stderr)
    print(f"{output}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {len(drawn)} figures; PNG: {', '.join(map(str, pictures))}")
    return 0
