"""How the model is spread over the ranks. A new strategy is one function and one line of the table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel


@dataclass
class Spread:
    """A wrapped model, and how its micro-steps run."""

    model: nn.Module
    micro_step: Callable[[bool], AbstractContextManager[object]]  # told whether it is the last of its step
    precision: Callable[[], AbstractContextManager[object]]


LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: str) -> Callable[[], AbstractContextManager[object]]:
    return lambda: torch.autocast(device, LOW[precision]) if precision in LOW else nullcontext()


def single(model: nn.Module, precision: str, device: str) -> Spread:
    return Spread(model, lambda last: nullcontext(), autocast(precision, device))


def ddp(model: nn.Module, precision: str, device: str) -> Spread:
    wrapped = DistributedDataParallel(model)
    return Spread(wrapped, lambda last: nullcontext() if last else wrapped.no_sync(), autocast(precision, device))


def fsdp2(model: nn.Module, precision: str, device: str) -> Spread:
    """Each child that has parameters is a unit; blocks of a list are units of their own."""
    low = LOW.get(precision)
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low and torch.float32)
    for child in model.children():
        for unit in child if isinstance(child, nn.ModuleList) else [child]:
            if any(True for _ in unit.parameters()) and not isinstance(unit, nn.RNNBase):  # recurrent kernels keep flat copies of weights
                fully_shard(unit, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    assert isinstance(model, FSDPModule)

    def micro_step(last: bool) -> AbstractContextManager[object]:
        model.set_requires_gradient_sync(last)
        return nullcontext()

    return Spread(model, micro_step, nullcontext)


STRATEGIES = {"single": single, "ddp": ddp, "fsdp2": fsdp2}


def spread_model(name: str, model: nn.Module, precision: str, device: str) -> Spread:
    if name not in STRATEGIES:
        sys.exit(f"strategy: {name!r} is not known; it is one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name](model, precision, device)
