"""Reads the lines that JSONLSink wrote. What cannot be read is described in plain words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distclip.cli.log_header import RunHeader, read_header
from distclip.cli.log_lines import LogLine, decode_line, printable_name
from distclip.cli.number_ranges import format_ranges
from distclip.cli.progress import ProgressBar
from distclip.cli.run_log import RunLog, StepColumns


class RunError(Exception):
    """A log of which nothing can be read. Its text names the remedy."""


def read_runs(
    paths: Sequence[str], check: Callable[[RunLog], None] = lambda run: None
) -> tuple[list[RunLog], list[str]]:
    """Read each file, and all `*.jsonl` of a folder. Names are unique: that of the header, or the
    file's. A bar on a terminal shows how far it is with large files.

    Returns:
        The logs, and a line for each file of a folder that could not be used, with the reason.

    Args:
        check: raises RunError for a log that the caller cannot use.

    Raises:
        RunError: a file that was named itself cannot be used, or a folder holds none that can.
    """
    named = {Path(path) for path in paths}
    files = log_files(paths)
    runs: list[RunLog] = []
    left_out: list[str] = []
    with ProgressBar(files) as progress:
        for file in files:
            try:
                # a file that was named itself may be a pipe
                if file not in named and file.exists() and not file.is_file():
                    raise RunError(f"{file} is no file")
                run = read_log(file, progress)
                check(run)
                runs.append(run)
            except RunError as error:
                if file in named:
                    raise
                left_out.append(f"left out: {error}")
    if not runs:
        raise RunError("none of the folder's files can be used\n" + "\n".join(left_out))
    return _with_unique_names(runs), left_out


def log_files(paths: Sequence[str]) -> list[Path]:
    """Each file, and all `*.jsonl` of a folder, once.

    Raises:
        RunError: a folder has none.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not inside:
            raise RunError(
                f"{path} is a folder without *.jsonl files; pass the file that JSONLSink wrote"
            )
        files += inside
    return list(dict.fromkeys(files))


def _with_unique_names(runs: Sequence[RunLog]) -> list[RunLog]:
    stems = [Path(run.path).stem for run in runs]
    own = [run.headers[-1].run if run.headers else "" for run in runs]
    out: list[RunLog] = []
    for run, stem, name in zip(runs, stems, own):
        if name and own.count(name) == 1:
            unique = name
        elif stems.count(stem) == 1:
            unique = f"{name} ({stem})" if name else stem
        else:
            unique = str(Path(run.path).with_suffix(""))
        out.append(replace(run, name=printable_name(unique)))
    return out


def read_log(path: Path, progress: ProgressBar | None = None) -> RunLog:
    """The readable part of a log; `notes` describe the rest.

    Raises:
        RunError: there is no such file, it cannot be read, is empty, or holds no line of a clipper.
    """
    found = _LogReader()
    try:
        with path.open("rb", buffering=1 << 20) as file:
            found.read(file, progress)
    except OSError as error:
        raise RunError(
            f"{path}: {error.strerror or error}; pass the file that JSONLSink wrote"
        ) from error
    if not found.columns.steps:
        what = (
            f"none of its {found.num_bad} lines is a report of distclip"
            if found.num_bad
            else "it has a header and no step yet"
            if found.headers
            else "it is empty"
        )
        raise RunError(
            f"{path}: {what}; write one with GradClipper(..., "
            'sinks=[distclip.JSONLSink("run.jsonl")])'
        )
    return found.build_log(path)


class _LogReader:
    """Reads a file line by line."""

    def __init__(self) -> None:
        self.headers: list[RunHeader] = []
        self.columns = StepColumns()
        self.bad_ranges: list[list[int]] = []  # first and last of consecutive lines
        self.num_bad = 0
        self._last_line_cut = False  # the last line is no report and has no end

    def read(self, file: Iterable[bytes], progress: ProgressBar | None) -> None:
        add, decode, unread = self.columns.adder(), decode_line, 0
        for number, text in enumerate(file, 1):
            unread += len(text)
            if unread > 1 << 21 and progress is not None:
                progress.advance(unread)
                unread = 0
            line = decode(text)
            if isinstance(line, LogLine):
                add(line)
            else:
                self._add_other(number, text, line)
        if progress is not None:
            progress.advance(unread)

    def _add_other(self, number: int, text: bytes, header: dict[str, Any] | None) -> None:
        if header is not None:
            self.headers.append(read_header(header))
        elif text.strip():
            self.num_bad += 1
            if self.bad_ranges and self.bad_ranges[-1][1] == number - 1:
                self.bad_ranges[-1][1] = number
            else:
                self.bad_ranges.append([number, number])
            self._last_line_cut = not text.endswith(b"\n")

    def build_log(self, path: Path) -> RunLog:
        run = self.columns.build_log(path, self.headers)
        notes = *self._unused_lines(path), *run.notes, *self._of_later_schemas(path)
        return replace(run, notes=notes)

    def _unused_lines(self, path: Path) -> Iterable[str]:
        bad = [(first, last) for first, last in self.bad_ranges]
        cut = bad[-1][1] if self._last_line_cut else 0
        if cut:
            bad[-1] = (bad[-1][0], cut - 1)
            bad = [(first, last) for first, last in bad if first <= last]
        if bad:
            num = sum(last - first + 1 for first, last in bad)
            count = "1 line is" if num == 1 else f"{num} lines are"
            yield f"{path}: {count} no report of distclip and left out: {_line_ranges(bad, num)}"
        if cut:
            yield (
                f"{path}: line {cut}, the last, is cut short and left out: the run "
                f"goes on, or was ended while it wrote"
            )

    def _of_later_schemas(self, path: Path) -> Iterable[str]:
        if newer := [header.schema for header in self.headers if header.is_newer]:
            yield (
                f"{path}: written by a later distclip (log schema {max(newer)}); what is new in it "
                f"is not shown"
            )


def _line_ranges(ranges: Sequence[tuple[int, int]], num: int, most: int = 8) -> str:
    """[(1, 3), (7, 7)] → "lines 1-3, 7"."""
    shown = format_ranges(ranges[:most], ", ")
    more = sum(b - a + 1 for a, b in ranges[most:])
    return f"line{'s' if num > 1 else ''} {shown}" + (f" and {more} more" if more else "")
