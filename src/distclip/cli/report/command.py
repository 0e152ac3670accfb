"""`distclip report RUN...`: one page with the figures of one or several runs, and the figures as
PNG."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from distclip.cli.outputs import OutputError, check_not_read, check_page, write_all
from distclip.cli.run_log import RunError, log_files, read_runs


def run(options: argparse.Namespace) -> int:
    """Returns the exit code: 0; 1 if matplotlib is missing or a file cannot be written; 2 if a log
    cannot be used or an output is refused."""
    output = Path(options.output)
    folder = Path(options.png) if options.png else output.parent
    try:
        logs = log_files(options.runs)
        check_not_read([output], logs)
        check_page(output)
        if folder.exists() and not folder.is_dir():
            raise OutputError(
                f"{folder} is a file where a folder is needed for "
                f"{'--png' if options.png else '--output'}"
            )
        runs, left_out = read_runs(options.runs)
        try:
            from distclip.cli.report.html import build_page
            from distclip.cli.report.plots import draw_figures
        except ImportError:
            print(
                'distclip report: figures need matplotlib: pip install "distclip[report]"',
                file=sys.stderr,
            )
            return 1
        drawn, without_glyphs = draw_figures(runs)
        pictures = {folder / f"{output.stem}-{figure.name}.png": figure.png for figure in drawn}
        check_not_read(pictures, logs)
    except (RunError, OutputError) as error:
        print(f"distclip report: {error}", file=sys.stderr)
        return 2
    try:
        write_all({output: build_page(runs, drawn).encode(errors="backslashreplace"), **pictures})
    except OSError as error:
        print(f"distclip report: {error}", file=sys.stderr)
        return 1
    for note in [*left_out, *(note for one in runs for note in one.notes), *without_glyphs]:
        print(f"note: {note}", file=sys.stderr)
    print(
        f"{output}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {len(drawn)} figures; PNG: "
        f"{', '.join(map(str, pictures))}"
    )
    return 0
