"""A part of each parameter on every rank."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from models import Block
from refusal import Refused
from strategies.spread import LOW, Context, Spread

REPLICAS = 2  # of hsdp: the shards are spread over half of the ranks each


def fsdp1(model: nn.Module, precision: str, device: str) -> Spread:
    low = LOW.get(precision)
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        mixed_precision=low and MixedPrecision(param_dtype=low, reduce_dtype=torch.float32),
        device_id=torch.cuda.current_device() if device == "cuda" else torch.device("cpu"),
        device_mesh=init_device_mesh(device, (dist.get_world_size(),)),
        use_orig_params=True,
    )
    return Spread(wrapped, nullcontext, lambda last: nullcontext() if last else wrapped.no_sync())


def fsdp2(model: nn.Module, precision: str, device: str) -> Spread:
    return sharded_over(None, model, precision)


def hsdp(model: nn.Module, precision: str, device: str) -> Spread:
    """Shards within a replica, copies over replicas: on several nodes one replica a node keeps most
    messages inside it."""
    world = dist.get_world_size()
    if world % REPLICAS:
        raise Refused(
            f"strategy: 'hsdp' makes {REPLICAS} replicas, and {world} ranks do not "
            f"divide by it; start an even number"
        )
    return sharded_over(
        init_device_mesh(
            device, (REPLICAS, world // REPLICAS), mesh_dim_names=("replica", "shard")
        ),
        model,
        precision,
    )


def sharded_over(mesh: DeviceMesh | None, model: nn.Module, precision: str) -> Spread:
    """Each child that has parameters is a unit; blocks of a list are units of their own."""
    low = LOW.get(precision)
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low and torch.float32)
    for child in model.children():
        for unit in child if isinstance(child, nn.ModuleList) else [child]:
            # recurrent kernels keep flat copies of weights
            if any(True for _ in unit.parameters()) and not isinstance(unit, nn.RNNBase):
                fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    assert isinstance(model, FSDPModule)

    def micro_step(last: bool) -> Context:
        model.set_requires_gradient_sync(last)
        return nullcontext()

    return Spread(model, nullcontext, micro_step)
