"""`distclip report RUN...`: one page to explore one or several runs in, and on demand PNGs of
the figures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from distclip.cli.log_reader import RunError, log_files, read_runs
from distclip.cli.norm_history import NormHistory
from distclip.cli.outputs import OutputError, check_not_read, check_page, check_pictures, write_all
from distclip.cli.report.page import build_page


def run(options: argparse.Namespace) -> int:
    """Returns the exit code: 0; 1 if matplotlib is missing or a file cannot be written; 2 if a log
    cannot be used or an output is refused."""
    output = Path(options.output)
    try:
        logs = log_files(options.runs)
        check_not_read([output], logs)
        check_page(output)
        folder = Path(options.png) if options.png else None
        if folder is not None and folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file where a folder is needed for --png")
        runs, left_out = read_runs(options.runs)
        histories = [NormHistory(one) for one in runs]
        pictures: dict[Path, bytes] = {}
        without_glyphs: list[str] = []
        if folder is not None:
            try:
                from distclip.cli.report.pictures import draw_pictures
            except ImportError:
                print(
                    'distclip report: --png needs matplotlib: pip install "distclip[report]"',
                    file=sys.stderr,
                )
                return 1
            drawn, without_glyphs = draw_pictures(histories)
            pictures = {folder / f"{output.stem}-{name}.png": png for name, png in drawn.items()}
            check_not_read(pictures, logs)
            check_pictures(pictures)
    except (RunError, OutputError) as error:
        print(f"distclip report: {error}", file=sys.stderr)
        return 2
    try:
        page = build_page(histories).encode(errors="backslashreplace")
        write_all({output: page, **pictures})
    except OSError as error:
        print(f"distclip report: {error}", file=sys.stderr)
        return 1
    for note in [*left_out, *(note for one in runs for note in one.notes), *without_glyphs]:
        print(f"note: {note}", file=sys.stderr)
    also = f"; PNG: {', '.join(map(str, pictures))}" if pictures else ""
    print(f"{output}: {len(runs)} run{'s' if len(runs) > 1 else ''}{also}")
    return 0
