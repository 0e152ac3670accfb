"""The whole model on every rank."""

from __future__ import annotations

from contextlib import nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from strategies.spread import Spread, autocast


def single(model: nn.Module, precision: str, device: str) -> Spread:
    return Spread(model, autocast(precision, device))


def ddp(model: nn.Module, precision: str, device: str) -> Spread:
    wrapped = DistributedDataParallel(model)
    return Spread(
        wrapped,
        autocast(precision, device),
        lambda last: nullcontext() if last else wrapped.no_sync(),
    )
