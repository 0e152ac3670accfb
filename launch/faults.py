"""Faults that are put into a run on purpose, to see what becomes of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from config import Inject
from refusal import Refused

ELEMENTS = {"overflow": math.inf, "nan": math.nan, "spike": 1000.0}
OF_RANK = 100.0
OF_WEIGHT = 128.0  # a power of two: taken back without a rounding error


def element_of(faults: Sequence[Inject], rank: int) -> float | None:
    """What one gradient element of this rank becomes."""
    return next((ELEMENTS[f.kind] for f in faults if f.kind in ELEMENTS and f.rank == rank), None)


def read_by(faults: Sequence[Inject], rank: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of the batch: zeros, as of an empty file, for kind batch."""
    if any(f.kind == "batch" and f.rank == rank for f in faults):
        return torch.zeros_like(x), torch.zeros_like(y)
    return x, y


@contextmanager
def in_model(faults: Sequence[Inject], rank: int, model: nn.Module) -> Iterator[None]:
    """Around a step: gradients of a rank that are too large, for kind rank; a weight that is too
    large on all ranks, for kind layer."""
    hooks = [scale_backward(model, OF_RANK) for f in faults if f.kind == "rank" and f.rank == rank]
    weights = [weight_of(model, f.weight) for f in faults if f.kind == "layer"]
    for weight in weights:
        weight.data.mul_(OF_WEIGHT)
    try:
        yield
    finally:
        for weight in weights:
            weight.data.div_(OF_WEIGHT)
        for hook in hooks:
            hook.remove()


def weight_of(model: nn.Module, name: str) -> nn.Parameter:
    """By its name without a wrapper's prefix. Refused where there is none."""
    named = {key.removeprefix("module."): param for key, param in model.named_parameters()}
    if name not in named:
        raise Refused(f"inject.weight={name!r}: the parameters are {', '.join(named)}")
    return named[name]


def scale_backward(model: nn.Module, factor: float) -> torch.utils.hooks.RemovableHandle:
    """Before the reduction: all gradients of this rank, by way of the model's output."""

    def scaled(module: nn.Module, given: object, out: Tensor) -> None:
        out.register_hook(lambda grad: grad * factor)

    return model.register_forward_hook(scaled)
