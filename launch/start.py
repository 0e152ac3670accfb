"""Runs a launcher in this process and says in one line what it says in a page when ranks end:
start.py MODULE ARGUMENTS...

The ranks' own words stand above that line. Used by the scripts of this folder.
"""

from __future__ import annotations

import logging
import runpy
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

REFUSED = 2  # train.py's exit code where the configuration cannot be honoured: it has said why


def main(arguments: list[str]) -> int:
    sys.argv = arguments
    # how each process ended
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(
        lambda record: False
    )
    try:
        runpy.run_module(arguments[0], run_name="__main__")
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode == REFUSED:
            return REFUSED
        print(
            f"launch: rank {rank} ended first, {how(first)}; what it said stands above",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def how(failure: ProcessFailure) -> str:
    if failure.exitcode >= 0:
        return f"with exit code {failure.exitcode}"
    out_of_memory = (
        ", which is what a machine without memory sends"
        if failure.signal_name() == "SIGKILL"
        else ""
    )
    return f"by {failure.signal_name()}{out_of_memory}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
