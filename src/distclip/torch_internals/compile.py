"""Calls that torch.compile must not trace, without importing the compiler for those who never
compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from distclip.errors import DistclipError

P = ParamSpec("P")
R = TypeVar("R")


def outside_compile(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable`, looked up when a compiled program first comes here: it imports the
    compiler, which takes seconds.

    What another rank tells whole leaves with a traceback of the caller's own lines.
    """

    @wraps(function)
    def call_outside(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        try:
            return function(*args, **kwargs)
        except DistclipError as error:
            if error.is_told_elsewhere:  # with all that led to it
                error.with_traceback(None)
            raise

    return call_outside
