"""How a training ends that cannot do what it was told, on the ranks of a launcher."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

_PATIENCE_S = 60  # for the first rank of this node, whose end makes its launcher end the others


class Refused(SystemExit):
    """What was asked for cannot be honoured: a text for the user."""


def is_first() -> bool:
    """Of the ranks of this node, or the only one."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def said_once() -> Iterator[None]:
    """What every rank would print alike is printed by the first of each node."""
    with ExitStack() as silence:
        if not is_first():
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(redirect_stdout(nowhere))
            silence.enter_context(redirect_stderr(nowhere))
        yield


def say(refused: Exception | Refused) -> int:
    """The text, once on each node where all of its ranks found the same; the exit code."""
    if not is_first():
        time.sleep(_PATIENCE_S)  # and then say it: this rank alone found it
    print(f"train.py: {refused}", file=sys.stderr, flush=True)
    return 2
