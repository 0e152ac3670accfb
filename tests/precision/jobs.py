"""Small models in training, one for each strategy on four ranks, with one loop for all
precisions."""

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from distclip.testing import fully_shard
from parity.layouts import mesh

STRATEGIES = ("single", "ddp", "fsdp1", "fsdp2", "hsdp", "tp", "pipeline")


def mlp(seed=0, inputs=6, hidden=10):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 4))


def spread(strategy):
    """The model, which batch a rank sees, options of the clipper, and the sets of ranks that share
    what they hold."""
    rank, everyone = dist.get_rank(), [(0, 1, 2, 3)]
    if strategy == "single":
        return mlp(), 0, {}, everyone
    if strategy == "ddp":
        return DDP(mlp()), rank, {}, everyone
    if strategy == "fsdp1":
        return FSDP1(mlp(), device_id=torch.device("cpu"), use_orig_params=True), rank, {}, []
    if strategy == "fsdp2":
        return fully_shard(mlp(), mesh=mesh(4)), rank, {}, []
    if strategy == "hsdp":
        return fully_shard(mlp(), mesh=mesh(2, 2)), rank, {}, [(0, 2), (1, 3)]
    if strategy == "tp":
        return (
            parallelize_module(
                mlp(hidden=12), mesh(4), {"0": ColwiseParallel(), "2": RowwiseParallel()}
            ),
            0,
            {},
            [],
        )
    # a stage of its own
    return mlp(seed=rank, hidden=4 + rank), rank, {"replicated_over": {"*": distclip.PRIVATE}}, []


def local(t):
    return t.to_local() if isinstance(t, DTensor) else t


def whole(t):
    return isinstance(t, DTensor) and all(isinstance(p, Replicate) for p in t.placements)


def bits(tensors):
    return b"".join(
        local(t).detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        for t in tensors
    )


@dataclass
class Poison:
    """What goes wrong at a step."""

    # "loss": overflows before the reduction; "grad": after it, in this rank's part of the gradients
    # alone
    kind: str
    rank: int
    value: float
    half: int = 0  # which optimizer's gradients


BAD = {
    0: Poison("loss", 1, math.inf),
    1: Poison("grad", 2, math.nan),
    17: Poison("grad", 3, math.inf, half=1),
    18: Poison("loss", 0, math.nan),
    60: Poison("grad", 1, math.nan, half=1),
    99: Poison("grad", 0, math.inf),
}


@dataclass
class Job:
    """Half of the parameters under a fused AdamW, which folds, half under SGD with momentum and
    weight decay, which does not."""

    strategy: str
    precision: str
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        self.model, self.which, extra, self.sharing = spread(self.strategy)
        params = list(self.model.parameters())
        self.halves = params[:2], params[2:]
        self.optimizers = (
            torch.optim.AdamW(self.halves[0], 2.0**-6, fused=True),
            torch.optim.SGD(self.halves[1], 2.0**-6, momentum=0.9, weight_decay=0.01),
        )
        self.clipper = distclip.GradClipper(self.model, **{"max_norm": 0.25} | extra | self.options)
        self.scaler = (
            torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=25)
            if self.precision == "fp16"
            else None
        )

    def backward(self, step, poison=None):
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        source = torch.Generator().manual_seed(1000 * step + self.which)
        x, y = torch.randn(5, 6, generator=source), torch.randn(5, 4, generator=source)
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
            loss = (self.model(x) - y).square().mean()
        mine = poison is not None and poison.rank == dist.get_rank()
        if mine and poison.kind == "loss":
            loss = loss * poison.value
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        if mine and poison.kind == "grad":
            grads = [
                local(p.grad)
                for half in (poison.half, 1 - poison.half)
                for p in self.halves[half]
                if p.grad is not None
            ]
            # FSDP1 may give this rank nothing of a half
            next(g for g in grads if g.numel()).view(-1)[-1] = poison.value

    def step(self):
        return self.clipper.step(*self.optimizers, scaler=self.scaler)

    def state(self):
        """Parameters and optimizer states of this rank."""
        tensors = [
            t
            for o in self.optimizers
            for s in o.state.values()
            for t in s.values()
            if isinstance(t, torch.Tensor)
        ]
        return bits([*self.model.parameters(), *tensors])

    def replicated(self):
        """Those that all ranks hold, in a model that is otherwise sharded."""
        return bits([p for p in self.model.parameters() if whole(p)])
