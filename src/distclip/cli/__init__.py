"""The `distclip` command. Help and refusals come from here and `arguments`; the file of a command
is imported when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn, TextIO

import distclip
from distclip.cli.arguments import of_doctor, of_report, of_suggest

_INTERRUPTED, _PIPE_CLOSED = 130, 141  # as the shell reports SIGINT and SIGPIPE


class _Command(NamedTuple):
    line: str  # for --help
    add_arguments: Callable[[argparse.ArgumentParser], None]
    module: str  # its function `run` takes the parsed options and gives the exit code


COMMANDS = {
    "doctor": _Command(
        "check on this machine or cluster that clipping works: run it under torchrun",
        of_doctor,
        "doctor.command",
    ),
    "report": _Command(
        "a page with figures of one or several runs, from the files that JSONLSink wrote",
        of_report,
        "report.command",
    ),
    "suggest": _Command(
        "how often which max_norm would have clipped a run, and which one to take",
        of_suggest,
        "suggest.command",
    ),
}


class _Parser(argparse.ArgumentParser):
    """Under torchrun every rank gets the same line: a refusal is said by the first rank of each
    node."""

    def error(self, message: str) -> NoReturn:
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
            sys.exit(2)
        super().error(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code.

    Raises:
        SystemExit: 0 after --help and --version, 2 for a wrong command or option.
    """
    # a file's name may hold what the terminal's encoding lacks
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        try:
            options = _parser().parse_args(arguments)
            return int(
                import_module(f"distclip.cli.{COMMANDS[options.command].module}").run(options)
            )
        finally:
            sys.stdout.flush()  # here, since what fails after the program's end is a traceback
    except BrokenPipeError:  # `distclip ... | head` has seen enough
        silence(sys.stdout)
        return _PIPE_CLOSED
    except KeyboardInterrupt:
        return _INTERRUPTED


def silence(stream: TextIO) -> None:
    """What is still to be printed there goes nowhere: the pipe that it would go to is closed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="distclip", description="Gradient clipping for distributed PyTorch")
    parser.add_argument("--version", action="version", version=f"distclip {distclip.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(
            commands.add_parser(name, help=command.line, description=command.line)
        )
    return parser
