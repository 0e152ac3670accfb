"""The `distclip` command. Each subcommand is a file with `add_arguments` and `run`, imported only when it is asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

import distclip

# command → (module, one line for --help)
COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("doctor", "check on this machine or cluster that clipping works: run it under torchrun"),
    "report": ("report_page", "a page with figures of one or several runs, from the files that JSONLSink wrote"),
    "suggest": ("suggest", "how often which max_norm would have clipped a run, and which one to take"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="distclip", description="Gradient clipping for distributed PyTorch")
    parser.add_argument("--version", action="version", version=f"distclip {distclip.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in given if word in COMMANDS), None)
    for name, (module, line) in COMMANDS.items():
        sub = commands.add_parser(name, help=line, description=line)
        if name == asked:
            import_module(f"distclip.cli.{module}").add_arguments(sub)
    options = parser.parse_args(given)
    return int(import_module(f"distclip.cli.{COMMANDS[options.command][0]}").run(options))
