"""Calls that neither autograd nor torch.compile records, without importing the compiler for those
who never compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable` and `torch.no_grad` in one decorator. The former is looked up when a
    compiled program first comes here: it imports the compiler, which takes seconds. The latter's
    own decorator makes four times as many calls of Python."""

    @wraps(function)
    def call_outside(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_dynamo_compiling():
            without_grad = torch.no_grad()(function)
            return torch.compiler.disable(without_grad)(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_grad_enabled(before)

    return call_outside
