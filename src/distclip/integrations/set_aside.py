"""A clip of some of a model's parameters: the gradients of the others are set aside while it is
made.

So one clipper of the whole model serves whatever is asked for at a step, and nothing has to be
agreed on anew when other parameters are frozen, unfrozen or given to the optimizer.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def set_aside(params: Iterable[Tensor]) -> Generator[list[tuple[Tensor, Tensor]]]:
    """Inside, these parameters have no gradient; afterwards the one that they had. Gives those that
    had one. Sends nothing."""
    had = [(param, param.grad) for param in params if param.grad is not None]
    for param, _ in had:
        param.grad = None
    try:
        yield had
    finally:
        for param, grad in had:
            param.grad = grad


def params_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    return [param for module in modules for param in module.parameters()]


def stepped_by(optimizer: Any) -> dict[int, Tensor]:
    """What the optimizer holds now, by identity."""
    return {id(param): param for group in optimizer.param_groups for param in group["params"]}
