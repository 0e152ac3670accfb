"""The matrices of each block split over the ranks, by heads and by hidden units; alone, or inside
FSDP2."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from models import GPT
from refusal import Refused
from strategies.sharded import sharded_over
from strategies.spread import Spread, autocast

WIDTH = 2  # ranks that share each matrix in tp_fsdp2; tp takes all ranks


def tp(model: nn.Module, precision: str, device: str) -> Spread:
    """All ranks read the same batch."""
    split(model, init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tensor",)))
    return Spread(model, autocast(precision, device), part=(0, 1))


def tp_fsdp2(model: nn.Module, precision: str, device: str) -> Spread:
    """Neighbours share matrices, FSDP2 shards over the rest."""
    world = dist.get_world_size()
    if world % WIDTH:
        raise Refused(
            f"strategy: 'tp_fsdp2' shares matrices by {WIDTH} ranks, and {world} do not "
            f"divide by it; start an even number"
        )
    mesh = init_device_mesh(device, (world // WIDTH, WIDTH), mesh_dim_names=("shard", "tensor"))
    split(model, mesh["tensor"])
    # the outputs of tensor-parallel modules are views; this model changes none of them in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    return replace(
        sharded_over(mesh["shard"], model, precision),
        part=(mesh["shard"].get_local_rank(), world // WIDTH),
    )


def split(model: nn.Module, mesh: DeviceMesh) -> None:
    assert isinstance(model, GPT)
    if model.blocks[0].heads % mesh.size():
        raise Refused(
            f"strategy: {model.blocks[0].heads} heads do not divide by {mesh.size()} "
            f"tensor-parallel ranks; start 2 or 4"
        )
    plan = {
        "qkv": ColwiseParallel(),
        "out": RowwiseParallel(),
        "mlp.0": ColwiseParallel(),
        "mlp.2": RowwiseParallel(),
    }
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
        keep_whole(block.norm1, mesh)
        keep_whole(block.norm2, mesh)
    for module in (model.token, model.position, model.norm, model.head):
        keep_whole(module, mesh)


def keep_whole(module: nn.Module, mesh: DeviceMesh) -> None:
    """Parameters that are not split become DTensors all the same: so FSDP2, checkpoints and
    distclip know them as copies."""
    distribute_module(
        module,
        mesh,
        input_fn=lambda _, inputs, mesh: tuple(
            DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in inputs
        ),
        output_fn=lambda _, output, mesh: output.to_local(),
    )
