"""What a strategy hands to the training program: the wrapped model, and how its micro-steps run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
Context = AbstractContextManager[object]


def every_rank() -> tuple[int, int]:
    """Each rank reads a part of the batch of its own."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@dataclass
class Spread:
    """A model as this rank holds it."""

    model: nn.Module  # what optimizer, clipper and checkpoint see
    precision: Callable[[], Context]  # around the forward pass
    # told whether it is the last of its step
    micro_step: Callable[[bool], Context] = field(default=lambda last: nullcontext())
    # which part of the batch this rank reads: (index, of how many)
    part: tuple[int, int] = field(default_factory=every_rank)
    # options that GradClipper needs for this layout
    clipper: dict[str, Any] = field(default_factory=dict)

    def gradients(
        self, x: Tensor, y: Tensor, accumulate: int, scaler: torch.amp.GradScaler
    ) -> Tensor | None:
        """Of the mean loss over this rank's part, in micro-steps, times the scaler's scale. That
        loss; None on ranks that see none."""
        total = torch.zeros((), device=x.device)
        for i, (part, target) in enumerate(
            zip(x.chunk(accumulate), y.chunk(accumulate), strict=True)
        ):
            with self.micro_step(i == accumulate - 1):
                with self.precision():
                    logits = self.model(part)
                loss = loss_of(logits, target) / accumulate
                scaler.scale(loss).backward()
            total += loss.detach()
        return total


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), target.flatten())


def autocast(precision: str, device: str) -> Callable[[], Context]:
    return lambda: torch.autocast(device, LOW[precision]) if precision in LOW else nullcontext()
