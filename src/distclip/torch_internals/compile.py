"""Calls that autograd does not record, nor torch.compile, without importing the compiler for those
who never compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def without_grad(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.no_grad`, whose own decorator makes eight times as many calls of Python at each call.
    Without `wraps`: torch.compile takes what has `__wrapped__` for a cache, and warns of it."""

    def call_without(*args: P.args, **kwargs: P.kwargs) -> R:
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return call_without


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable` beside `torch.no_grad`. The former is looked up when a compiled
    program first comes here: it imports the compiler, which takes seconds."""
    call_without = without_grad(function)

    @wraps(function)
    def call_outside(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(call_without)(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        return call_without(*args, **kwargs)

    return call_outside
