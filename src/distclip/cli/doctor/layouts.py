"""The layouts that the doctor runs: torch's own wrappers around a small network, and the float64
gradients that they must hold.

Weights, data and the loss's weights are small whole numbers, so that gradients are exact in float32
whichever way they are summed; the oracle is the same network in one process, in float64, on the
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
class Case:
    """What is clipped on this rank, and what the whole model's gradients are."""

    params: Any  # as GradClipper takes them
    own: list[nn.Parameter]
    want: list[Tensor]  # float64, on the CPU
    options: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Layout:
    name: str
    line: str
    sends: str  # by torch's wrapper, in `build`
    build: Callable[[CheckContext], Case]
    ranks: int = 2  # the least
    even: bool = False


def drawn(name: str, *shape: int) -> Tensor:
    """Whole numbers from -3 to 3, given by the name."""
    return torch.randint(
        -3, 4, shape, generator=torch.Generator().manual_seed(crc32(name.encode()))
    ).float()


class Net(nn.Module):
    def __init__(self, hidden: int, name: str = "net") -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        with torch.no_grad():
            for part, param in self.named_parameters():
                param.copy_(drawn(f"{name}.{part}", *param.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def data(shard: int) -> Tensor:
    """[batch, width] of one data-parallel rank."""
    return drawn(f"data{shard}", BATCH, WIDTH)


def loss(out: Tensor) -> Tensor:
    return (
        out * drawn("pull", BATCH, WIDTH).to(out.device, out.dtype).repeat(out.shape[0] // BATCH, 1)
    ).sum()


def truth(shards: Iterable[int], hidden: int, name: str = "net") -> list[Tensor]:
    """Gradients of the whole network, averaged over the data of all shards: one process,
    float64."""
    net, parts = Net(hidden, name).double(), [data(shard).double() for shard in shards]
    (loss(net(torch.cat(parts))) / len(parts)).backward()
    return [param.grad for param in net.parameters() if param.grad is not None]


def hidden_of(bench: CheckContext) -> int:
    """A multiple of the ranks: tensor parallelism splits it."""
    return max(16 // bench.size, 2) * bench.size


def backward(model: nn.Module, bench: CheckContext, shard: int) -> list[nn.Parameter]:
    """One backward pass on a shard's data; the model's parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's wrappers, about themselves
        loss(model(data(shard).to(bench.device))).backward()
    return list(model.parameters())


@cache
def mesh(device: str, *shape: int) -> DeviceMesh:
    return init_device_mesh(device, shape, mesh_dim_names=("outer", "inner")[: len(shape)])


def wrapped(wrap: Callable[[Net], nn.Module], bench: CheckContext, shards: int, shard: int) -> Case:
    hidden = hidden_of(bench)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = wrap(Net(hidden).to(bench.device))
    return Case(model, backward(model, bench, shard), truth(range(shards), hidden))


def copies(bench: CheckContext) -> Case:
    def same(net: Net) -> nn.Module:
        return net

    return wrapped(same, bench, 1, 0)


def ddp(bench: CheckContext) -> Case:
    return wrapped(DDP, bench, bench.size, bench.rank)


def fsdp1(bench: CheckContext) -> Case:
    def wrap(net: Any) -> nn.Module:
        unit = partial(
            FSDP1,
            use_orig_params=True,
            device_id=bench.device,
            device_mesh=mesh(bench.device.type, bench.size),
        )
        net.up = unit(net.up)
        return unit(net)

    return wrapped(wrap, bench, bench.size, bench.rank)


def _fully_sharded(net: Any, on: DeviceMesh) -> nn.Module:
    fully_shard(net.up, mesh=on)
    return fully_shard(net, mesh=on)


def fsdp2(bench: CheckContext) -> Case:
    return wrapped(
        partial(_fully_sharded, on=mesh(bench.device.type, bench.size)),
        bench,
        bench.size,
        bench.rank,
    )


def hsdp(bench: CheckContext) -> Case:
    return wrapped(
        partial(_fully_sharded, on=mesh(bench.device.type, 2, bench.size // 2)),
        bench,
        bench.size,
        bench.rank,
    )


def _split(net: nn.Module, on: DeviceMesh) -> nn.Module:
    return parallelize_module(net, on, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def tp(bench: CheckContext) -> Case:
    return wrapped(partial(_split, on=mesh(bench.device.type, bench.size)), bench, 1, 0)


def tp_fsdp2(bench: CheckContext) -> Case:
    grid = mesh(bench.device.type, bench.size // 2, 2)

    def wrap(net: Net) -> nn.Module:
        return _fully_sharded(_split(net, grid["inner"]), grid["outer"])

    return wrapped(wrap, bench, bench.size // 2, bench.rank // 2)


def stages(bench: CheckContext, without: int | None = None) -> Case:
    """Each rank a network of its own under the same names; rank `without` has no gradients."""
    net = Net(16, f"stage{bench.rank}").to(bench.device)
    own = backward(net, bench, 0)
    if bench.rank == without:
        net.zero_grad(set_to_none=True)
    want = [
        grad
        for rank in range(bench.size)
        if rank != without
        for grad in truth([0], 16, f"stage{rank}")
    ]
    return Case(
        net, own, want, {"replicated_over": {"*": distclip.PRIVATE}} if bench.size > 1 else {}
    )


def last_without(bench: CheckContext) -> Case:
    return stages(bench, without=bench.size - 1)


def experts(bench: CheckContext) -> Case:
    """A gate held by all, an expert by one rank, and, in an even world, an expert that half of the
    ranks share."""

    def given(name: str) -> nn.Parameter:
        param = nn.Parameter(torch.zeros(WIDTH, WIDTH, device=bench.device))
        param.grad = drawn(name, WIDTH, WIDTH).to(bench.device)
        return param

    params = [("gate", given("gate")), ("expert", given(f"expert{bench.rank}"))]
    want = ["gate", *(f"expert{rank}" for rank in range(bench.size))]
    over: dict[str, dist.ProcessGroup | Any] = {"expert": distclip.PRIVATE}
    if bench.size >= 4 and bench.size % 2 == 0:
        params.append(("shared", given(f"shared{bench.rank // (bench.size // 2)}")))
        want += ["shared0", "shared1"]
        over["shared"] = mesh(bench.device.type, 2, bench.size // 2)["inner"].get_group()
    return Case(
        params,
        [p for _, p in params],
        [drawn(name, WIDTH, WIDTH).double() for name in want],
        {"replicated_over": over},
    )


LAYOUTS = (
    Layout(
        "copies", "the same gradients on every rank, without a wrapper", "nothing", copies, ranks=1
    ),
    Layout("ddp", "DistributedDataParallel", "broadcast, all_reduce", ddp),
    Layout("fsdp1", "FullyShardedDataParallel, nested units", "all_gather, reduce_scatter", fsdp1),
    Layout("fsdp2", "fully_shard, nested units", "all_gather, reduce_scatter", fsdp2),
    Layout(
        "hsdp",
        "fully_shard on a mesh of 2 × n",
        "all_gather, reduce_scatter, all_reduce",
        hsdp,
        ranks=4,
        even=True,
    ),
    Layout("tp", "tensor parallel, column- and row-wise", "broadcast, scatter, all_reduce", tp),
    Layout(
        "tp+fsdp2",
        "tensor parallel over 2 and fully_shard over the rest",
        "all_gather, reduce_scatter",
        tp_fsdp2,
        ranks=4,
        even=True,
    ),
    Layout("stages", "pipeline stages: replicated_over={'*': PRIVATE}", "nothing", stages),
    Layout(
        "experts",
        "experts of one rank and of a group of ranks, by replicated_over",
        "nothing",
        experts,
    ),
    Layout(
        "missing",
        "one rank has no gradients at all: no hang, the others' norm",
        "nothing",
        last_without,
    ),
)
