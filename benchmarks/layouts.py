"""How each distributed layout is built on a rank, its gradients, and its peers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

import distclip

CLIP, LOCAL, DROP_IN = (
    "GradClipper.clip_",
    "GradClipper.clip_, local part",
    "distclip.clip_grad_norm_",
)
TORCH, FOREACH = "torch clip_grad_norm_", "torch clip_grad_norm_(foreach=True)"
RECIPE, METHOD = "torchtitan's recipe", "FSDP1's method"
WIDTH = 64


class Built(NamedTuple):
    """A rank's model with gradients, and the calls to compare by name; each takes max_norm and
    gives what is timed."""

    model: nn.Module
    contenders: dict[str, Callable[[float], Callable[[], object]]]


@dataclass(frozen=True, slots=True)
class Layout:
    build: Callable[[int, str], Built]  # (parameters, variant)
    compared: tuple[tuple[str, str], ...]  # (peer, distclip)
    variants: tuple[str, ...] = ("",)
    peer_sends_nothing: bool = False
    # both sides send by `all_reduce` alone: their local parts are compared too
    has_local_parts: bool = False

    def pairs(self, times: dict[str, Any]) -> list[tuple[str, str]]:
        return [(peer, ours) for peer, ours in self.compared if peer in times and ours in times]


def linears(count: int) -> nn.Sequential:
    """`count` parameters: layers of a weight [64, 64] and a bias [64], in blocks of ten
    parameters."""
    return nn.Sequential(
        *(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(5))) for _ in range(count // 10))
    )


def fill(model: nn.Module) -> None:
    """A random gradient for each parameter, equal where ranks hold copies, placed like the
    parameter."""
    for i, param in enumerate(model.parameters()):
        part: Any = 0
        local: Tensor = param
        if isinstance(param, DTensor):
            coordinate = param.device_mesh.get_coordinate()
            part = [
                c
                for c, placed in zip(coordinate or (), param.placements)
                if not isinstance(placed, Replicate)
            ]
            local = param.to_local()
        draw = torch.Generator().manual_seed(crc32(f"{i} {part}".encode()))
        grad = torch.randn(local.shape, generator=draw)
        if isinstance(param, DTensor):
            grad = DTensor.from_local(
                grad,
                param.device_mesh,
                param.placements,
                run_check=False,
                shape=param.shape,
                stride=param.stride(),
            )
        param.grad = grad


def recipe(params: list[nn.Parameter], max_norm: float) -> None:
    """torchtitan's way: the norm as a DTensor, gathered, then the scaling."""
    total = get_total_norm([p.grad for p in params if p.grad is not None], 2.0)
    if isinstance(total, DTensor):
        total = total.full_tensor()
    clip_grads_with_norm_(params, max_norm, total)


def of_dtensors(model: nn.Module) -> Built:
    fill(model)
    params = list(model.parameters())
    return Built(
        model,
        {
            TORCH: lambda limit: lambda: clip_grad_norm_(params, limit),
            FOREACH: lambda limit: lambda: clip_grad_norm_(params, limit, foreach=True),
            RECIPE: lambda limit: lambda: recipe(params, limit),
            CLIP: lambda limit: distclip.GradClipper(model, limit).clip_,
            DROP_IN: lambda limit: lambda: distclip.clip_grad_norm_(params, limit),
        },
    )


def build_fsdp2(count: int, variant: str) -> Built:
    model = linears(count)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in model:
        fully_shard(block, mesh=mesh)
    return of_dtensors(fully_shard(model, mesh=mesh))


def build_tp(count: int, variant: str) -> Built:
    """Tensor parallel over two ranks, FSDP2 over the others."""
    # torch advises against its own two all-reduces
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    size = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    model = linears(count)
    for block in model:
        plan = {str(i): RowwiseParallel() if i % 2 else ColwiseParallel() for i in range(5)}
        parallelize_module(block, mesh["tp"], plan)
        fully_shard(block, mesh=mesh["dp"])
    return of_dtensors(fully_shard(model, mesh=mesh["dp"]))


def build_ddp(count: int, variant: str) -> Built:
    model = DistributedDataParallel(linears(count))
    fill(model)
    params = list(model.parameters())
    return Built(
        model,
        {
            TORCH: lambda limit: lambda: clip_grad_norm_(params, limit),
            LOCAL: lambda limit: (
                distclip.GradClipper(model.module, limit, process_group=distclip.LOCAL).clip_
            ),
            CLIP: lambda limit: distclip.GradClipper(model, limit).clip_,
            DROP_IN: lambda limit: lambda: distclip.clip_grad_norm_(params, limit),
        },
    )


def build_fsdp1(count: int, variant: str) -> Built:
    """Units of ten parameters, after a real backward pass."""
    original = variant == "use_orig_params"
    inner = linears(count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls FSDP1 deprecated
        for i, block in enumerate(inner):
            inner[i] = FullyShardedDataParallel(
                block, device_id=torch.device("cpu"), use_orig_params=original
            )
        model = FullyShardedDataParallel(
            inner, device_id=torch.device("cpu"), use_orig_params=original
        )
        model(torch.randn(4, WIDTH)).square().mean().backward()
    draw = torch.Generator().manual_seed(torch.distributed.get_rank())
    for param in model.parameters():  # those of a backward through many layers vanish
        if param.grad is not None:
            param.grad.normal_(generator=draw)
    return Built(
        model,
        {
            METHOD: lambda limit: lambda: model.clip_grad_norm_(limit),
            CLIP: lambda limit: distclip.GradClipper(model, limit).clip_,
        },
    )


LAYOUTS = {
    "ddp": Layout(
        build_ddp, ((TORCH, LOCAL), (TORCH, DROP_IN), (TORCH, CLIP)), peer_sends_nothing=True
    ),
    "fsdp1": Layout(
        build_fsdp1,
        ((METHOD, CLIP),),
        ("use_orig_params", "flat parameters"),
        has_local_parts=True,
    ),
    "fsdp2": Layout(
        build_fsdp2, ((TORCH, CLIP), (FOREACH, CLIP), (RECIPE, CLIP), (TORCH, DROP_IN))
    ),
    "tp": Layout(build_tp, ((TORCH, CLIP), (FOREACH, CLIP), (RECIPE, CLIP), (TORCH, DROP_IN))),
}
