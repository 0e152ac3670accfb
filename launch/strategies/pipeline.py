"""The blocks dealt to two stages; micro-steps are the pipeline's micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from models import GPT
from refusal import Refused
from strategies.spread import Context, Spread, autocast, loss_of

STAGES = 2


class Stage(nn.Module):
    """Consecutive blocks of a GPT under the names that they have there; the first stage embeds, the
    last predicts."""

    def __init__(self, model: GPT, index: int, precision: Callable[[], Context]) -> None:
        super().__init__()
        self.precision, self.context = precision, model.position.num_embeddings
        each = len(model.blocks) // STAGES
        if index == 0:
            self.token, self.position = model.token, model.position
        self.blocks = nn.ModuleDict(
            {str(i): model.blocks[i] for i in range(index * each, (index + 1) * each)}
        )
        if index == STAGES - 1:
            self.norm, self.head = model.norm, model.head

    def forward(self, h: Tensor) -> Tensor:
        with self.precision():
            if hasattr(self, "token"):
                h = self.token(h) + self.position(torch.arange(h.shape[1], device=h.device))
            for block in self.blocks.values():
                h = block(h)
            return self.head(self.norm(h)) if hasattr(self, "head") else h


@dataclass
class Staged(Spread):
    """One stage of a pipeline; each rank of a stage reads a part of the batch of its own."""

    stage: PipelineStage = field(kw_only=True)
    data: dist.ProcessGroup = field(kw_only=True)  # ranks with the same stage
    schedules: dict[int, Any] = field(default_factory=dict)

    def gradients(
        self, x: Tensor, y: Tensor, accumulate: int, scaler: torch.amp.GradScaler
    ) -> Tensor | None:
        if accumulate not in self.schedules:
            # 1F1B wants as many micro-batches as stages
            kind = Schedule1F1B if accumulate >= STAGES else ScheduleGPipe
            self.schedules[accumulate] = kind(
                self.stage,
                accumulate,
                loss_fn=lambda out, target: scaler.scale(loss_of(out, target)),
            )
        # a scaler makes its scale at its first loss, and this stage sees none
        if not self.stage.is_last:
            scaler.scale(torch.zeros((), device=x.device))
        losses: list[Tensor] = []
        self.schedules[accumulate].step(
            *([x] if self.stage.is_first else []),
            target=y if self.stage.is_last else None,
            losses=losses,
        )
        # DDP around a stage fails once it regroups its buckets between micro-batches
        for param in self.model.parameters():
            if param.grad is not None and self.data.size() > 1:
                dist.all_reduce(param.grad.div_(self.data.size()), group=self.data)
        return torch.stack(losses).mean().detach() / scaler.get_scale() if losses else None


def pp(model: nn.Module, precision: str, device: str) -> Spread:
    """Ranks 0 … n/2-1 hold the first stage, the others the second; gradients are averaged over the
    ranks of a stage."""
    world = dist.get_world_size()
    if world % STAGES:
        raise Refused(
            f"strategy: 'pp' has {STAGES} stages, and {world} ranks do not divide by it; "
            f"start an even number"
        )
    assert isinstance(model, GPT)
    mesh = init_device_mesh(device, (STAGES, world // STAGES), mesh_dim_names=("stage", "data"))
    index, data = mesh["stage"].get_local_rank(), mesh["data"].get_group()
    own = Stage(model, index, autocast(precision, device))
    stage = PipelineStage(own, index, STAGES, torch.device(device), group=mesh["stage"].get_group())
    over = {"replicated_over": {"*": data}}
    return Staged(
        own, nullcontext, part=(data.rank(), data.size()), clipper=over, stage=stage, data=data
    )
