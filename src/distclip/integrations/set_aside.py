"""Clips some of a model's parameters, with the gradients of the others set aside meanwhile.

So one clipper of the whole model serves any subset, and needs no new collective set-up when other
parameters are frozen, unfrozen or added to the optimizer.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def set_aside(params: Iterable[Tensor]) -> Generator[list[tuple[Tensor, Tensor]]]:
    """Within this context the `.grad` of these parameters is None; it is restored at the end. No
    collective. Yields the parameters that had a gradient, each with it."""
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
    """The parameters that the optimizer holds now, by their ids."""
    return {id(param): param for group in optimizer.param_groups for param in group["params"]}
