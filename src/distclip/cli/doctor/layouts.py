"""The layouts that the doctor runs: torch's own wrappers around a small network, and the float64
gradients that they must give.

Weights, data and the loss's weights are small whole numbers, so that gradients are exact in float32
in whatever order they are summed; the oracle is the same network in one process, in float64, on the
data of all ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from distclip.cli.doctor.records import CheckContext
from distclip.testing import fully_shard

WIDTH, BATCH = 8, 3


@dataclass(frozen=True, slots=True)
class LayoutCase:
    """What is clipped on this rank, and what the whole model's gradients are."""

    params: Any  # as GradClipper takes them
    own: list[nn.Parameter]
    want: list[Tensor]  # float64, on the CPU
    options: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class DoctorLayout:
    name: str
    line: str
    sends: str  # by torch's wrapper, in `build`
    build: Callable[[CheckContext], LayoutCase]
    ranks: int = 2  # at least
    even: bool = False


def drawn_integers(name: str, *shape: int) -> Tensor:
    """Random integers from -3 to 3 as float32; the name is the seed."""
    return torch.randint(
        -3, 4, shape, generator=torch.Generator().manual_seed(crc32(name.encode()))
    ).float()


class SmallNet(nn.Module):
    def __init__(self, hidden: int, name: str = "net") -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        with torch.no_grad():
            for part, param in self.named_parameters():
                param.copy_(drawn_integers(f"{name}.{part}", *param.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def shard_data(shard: int) -> Tensor:
    """[batch, width] of one data-parallel rank."""
    return drawn_integers(f"data{shard}", BATCH, WIDTH)


def weighted_sum(out: Tensor) -> Tensor:
    return (
        out
        * drawn_integers("pull", BATCH, WIDTH)
        .to(out.device, out.dtype)
        .repeat(out.shape[0] // BATCH, 1)
    ).sum()


def oracle_grads(shards: Iterable[int], hidden: int, name: str = "net") -> list[Tensor]:
    """Gradients of the whole network, averaged over the data of all shards: one process,
    float64."""
    net, parts = SmallNet(hidden, name).double(), [shard_data(shard).double() for shard in shards]
    (weighted_sum(net(torch.cat(parts))) / len(parts)).backward()
    return [param.grad for param in net.parameters() if param.grad is not None]


def hidden_size(context: CheckContext) -> int:
    """A multiple of the number of ranks, by which tensor parallelism splits it."""
    return max(16 // context.size, 2) * context.size


def run_backward(model: nn.Module, context: CheckContext, shard: int) -> list[nn.Parameter]:
    """One backward pass on a shard's data; returns the model's parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's wrappers warn about themselves
        weighted_sum(model(shard_data(shard).to(context.device))).backward()
    return list(model.parameters())


@cache
def cached_mesh(device: str, *shape: int) -> DeviceMesh:
    return init_device_mesh(device, shape, mesh_dim_names=("outer", "inner")[: len(shape)])


def wrapped_case(
    wrap: Callable[[SmallNet], nn.Module], context: CheckContext, shards: int, shard: int
) -> LayoutCase:
    hidden = hidden_size(context)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = wrap(SmallNet(hidden).to(context.device))
    return LayoutCase(
        model, run_backward(model, context, shard), oracle_grads(range(shards), hidden)
    )


def copies_case(context: CheckContext) -> LayoutCase:
    def same(net: SmallNet) -> nn.Module:
        return net

    return wrapped_case(same, context, 1, 0)


def ddp_case(context: CheckContext) -> LayoutCase:
    return wrapped_case(DDP, context, context.size, context.rank)


def fsdp1_case(context: CheckContext) -> LayoutCase:
    def wrap(net: Any) -> nn.Module:
        unit = partial(
            FSDP1,
            use_orig_params=True,
            device_id=context.device,
            device_mesh=cached_mesh(context.device.type, context.size),
        )
        net.up = unit(net.up)
        return unit(net)

    return wrapped_case(wrap, context, context.size, context.rank)


def _fully_sharded(net: Any, on: DeviceMesh) -> nn.Module:
    fully_shard(net.up, mesh=on)
    return fully_shard(net, mesh=on)


def fsdp2_case(context: CheckContext) -> LayoutCase:
    return wrapped_case(
        partial(_fully_sharded, on=cached_mesh(context.device.type, context.size)),
        context,
        context.size,
        context.rank,
    )


def hsdp_case(context: CheckContext) -> LayoutCase:
    return wrapped_case(
        partial(_fully_sharded, on=cached_mesh(context.device.type, 2, context.size // 2)),
        context,
        context.size,
        context.rank,
    )


def _tensor_parallel(net: nn.Module, on: DeviceMesh) -> nn.Module:
    return parallelize_module(net, on, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def tp_case(context: CheckContext) -> LayoutCase:
    return wrapped_case(
        partial(_tensor_parallel, on=cached_mesh(context.device.type, context.size)), context, 1, 0
    )


def tp_fsdp2_case(context: CheckContext) -> LayoutCase:
    grid = cached_mesh(context.device.type, context.size // 2, 2)

    def wrap(net: SmallNet) -> nn.Module:
        return _fully_sharded(_tensor_parallel(net, grid["inner"]), grid["outer"])

    return wrapped_case(wrap, context, context.size // 2, context.rank // 2)


def stages_case(context: CheckContext, without: int | None = None) -> LayoutCase:
    """Each rank has a network of its own under the same names; rank `without` has no gradients."""
    net = SmallNet(16, f"stage{context.rank}").to(context.device)
    own = run_backward(net, context, 0)
    if context.rank == without:
        net.zero_grad(set_to_none=True)
    want = [
        grad
        for rank in range(context.size)
        if rank != without
        for grad in oracle_grads([0], 16, f"stage{rank}")
    ]
    return LayoutCase(
        net, own, want, {"replicated_over": {"*": distclip.PRIVATE}} if context.size > 1 else {}
    )


def missing_case(context: CheckContext) -> LayoutCase:
    return stages_case(context, without=context.size - 1)


def experts_case(context: CheckContext) -> LayoutCase:
    """A gate on all ranks, an expert on each, and, with an even number of ranks, an expert that
    half of the ranks share."""

    def given(name: str) -> nn.Parameter:
        param = nn.Parameter(torch.zeros(WIDTH, WIDTH, device=context.device))
        param.grad = drawn_integers(name, WIDTH, WIDTH).to(context.device)
        return param

    params = [("gate", given("gate")), ("expert", given(f"expert{context.rank}"))]
    want = ["gate", *(f"expert{rank}" for rank in range(context.size))]
    over: dict[str, dist.ProcessGroup | Any] = {"expert": distclip.PRIVATE}
    if context.size >= 4 and context.size % 2 == 0:
        params.append(("shared", given(f"shared{context.rank // (context.size // 2)}")))
        want += ["shared0", "shared1"]
        over["shared"] = cached_mesh(context.device.type, 2, context.size // 2)["inner"].get_group()
    return LayoutCase(
        params,
        [p for _, p in params],
        [drawn_integers(name, WIDTH, WIDTH).double() for name in want],
        {"replicated_over": over},
    )


LAYOUTS = (
    DoctorLayout(
        "copies",
        "the same gradients on every rank, without a wrapper",
        "nothing",
        copies_case,
        ranks=1,
    ),
    DoctorLayout("ddp", "DistributedDataParallel", "broadcast, all_reduce", ddp_case),
    DoctorLayout(
        "fsdp1", "FullyShardedDataParallel, nested units", "all_gather, reduce_scatter", fsdp1_case
    ),
    DoctorLayout("fsdp2", "fully_shard, nested units", "all_gather, reduce_scatter", fsdp2_case),
    DoctorLayout(
        "hsdp",
        "fully_shard on a mesh of 2 × n",
        "all_gather, reduce_scatter, all_reduce",
        hsdp_case,
        ranks=4,
        even=True,
    ),
    DoctorLayout(
        "tp", "tensor parallel, column- and row-wise", "broadcast, scatter, all_reduce", tp_case
    ),
    DoctorLayout(
        "tp+fsdp2",
        "tensor parallel over 2 and fully_shard over the rest",
        "all_gather, reduce_scatter",
        tp_fsdp2_case,
        ranks=4,
        even=True,
    ),
    DoctorLayout(
        "stages", "pipeline stages: replicated_over={'*': PRIVATE}", "nothing", stages_case
    ),
    DoctorLayout(
        "experts",
        "experts of one rank and of a group of ranks, by replicated_over",
        "nothing",
        experts_case,
    ),
    DoctorLayout(
        "missing",
        "one rank has no gradients at all: no hang, the others' norm",
        "nothing",
        missing_case,
    ),
)
