"""The `distclip` command. Help and usage errors come from here and `arguments`; a command's own
module is imported only when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn, TextIO

import distclip
from distclip.cli.arguments import add_doctor_arguments, add_report_arguments, add_suggest_arguments

_EXTRA_PACKAGES = ("numpy", "msgspec")  # of the extra "report"
_INTERRUPTED, _PIPE_CLOSED = 130, 141  # as the shell reports SIGINT and SIGPIPE


class CommandEntry(NamedTuple):
    line: str  # for --help
    add_arguments: Callable[[argparse.ArgumentParser], None]
    module: str  # its function `run` takes the parsed options and returns the exit code


COMMANDS = {
    "doctor": CommandEntry(
        "check on this machine or cluster that clipping works: run it under torchrun",
        add_doctor_arguments,
        "doctor.command",
    ),
    "report": CommandEntry(
        "a page with figures of one or several runs, from the files that JSONLSink wrote",
        add_report_arguments,
        "report.command",
    ),
    "suggest": CommandEntry(
        "how often which max_norm would have clipped a run, and which one to take",
        add_suggest_arguments,
        "suggest.command",
    ),
}


class _OneRankParser(argparse.ArgumentParser):
    """Under torchrun every rank gets the same command line: only the first rank of each node prints
    a usage error."""

    def error(self, message: str) -> NoReturn:
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
            sys.exit(2)
        super().error(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Raises:
        SystemExit: 0 after --help and --version, 2 for a wrong command or option.
    """
    # a file's name may have characters that the terminal's encoding has not
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        try:
            options = _build_parser().parse_args(arguments)
            return _run_command(options)
        finally:
            sys.stdout.flush()  # here: a failure at the interpreter's exit prints a traceback
    except BrokenPipeError:  # the reader of `distclip ... | head` has exited
        silence_stream(sys.stdout)
        return _PIPE_CLOSED
    except KeyboardInterrupt:
        return _INTERRUPTED


def _run_command(options: argparse.Namespace) -> int:
    """Import its module and run it; 1 where a package that reads logs is missing."""
    try:
        module = import_module(f"distclip.cli.{COMMANDS[options.command].module}")
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA_PACKAGES:
            raise
        print(
            f"distclip {options.command}: logs are read with {' and '.join(_EXTRA_PACKAGES)}: "
            'pip install "distclip[report]"',
            file=sys.stderr,
        )
        return 1
    return int(module.run(options))


def silence_stream(stream: TextIO) -> None:
    """Discard everything printed there from now on: the pipe behind it is closed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _build_parser() -> argparse.ArgumentParser:
    parser = _OneRankParser(
        prog="distclip", description="Gradient clipping for distributed PyTorch"
    )
    parser.add_argument("--version", action="version", version=f"distclip {distclip.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(
            commands.add_parser(name, help=command.line, description=command.line)
        )
    return parser
