"""One training on this rank: model, optimizer, clipper and scaler, and a step of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import distclip
from checkpoint import Run, resume, save
from clipping import options, rule
from config import Config
from models import make_model
from strategies import spread_model


class Job:
    """The loop of torch alone; frameworks replace what they own.

    After `__init__`: `optimizer`, `clipper`, `scaler` (disabled but in fp16), and `part`: which
    part of the batch this rank reads, (index, of how many).

    `note` says of the next step which data it reads, for the log; frameworks, which call the
    clipper themselves, do not pass it on.
    """

    note: object = None

    def __init__(self, config: Config, device: str) -> None:
        training = config.training
        self.config = config
        self.spread = spread_model(
            config.strategy,
            make_model(config.model, training.seed).to(device),
            training.precision,
            device,
        )
        self.model, self.part = self.spread.model, self.spread.part
        by_rank = distclip.RankNorms(self.model) if config.clip.rank_norms else None
        self.clipper = distclip.GradClipper(
            self.model,
            policy=rule(config.clip),
            rank_norms=by_rank,
            **options(config),
            **self.spread.clipper,
        )
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(
            device, enabled=training.precision == "fp16", growth_interval=200
        )

    def step(
        self, x: Tensor, y: Tensor, fault: float | None
    ) -> tuple[Tensor | None, distclip.ClipReport]:
        """The mean loss over this rank's part (None where it sees none), and what was clipped.

        Args:
            fault: a value that one gradient element of this rank takes before clipping.
        """
        self.optimizer.zero_grad()
        loss = self.spread.gradients(x, y, self.config.training.accumulate, self.scaler)
        if fault is not None:
            spoil(self.model, fault)
        return loss, self.clipper.step(self.optimizer, scaler=self.scaler, note=self.note)

    def save(self, folder: str, step: int) -> None:
        save(folder, step, Run(self.model, self.optimizer, self.clipper, self.scaler))

    def resume(self, folder: str) -> int:
        """The step to go on with."""
        return resume(folder, Run(self.model, self.optimizer, self.clipper, self.scaler))


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    make = torch.optim.SGD if config.training.optimizer == "sgd" else torch.optim.AdamW
    return make(model.parameters(), config.training.lr)


def spoil(model: nn.Module, fault: float) -> None:
    """After the reduction: on this rank alone."""
    for param in model.parameters():
        grad = param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad
        if grad is not None and grad.numel():
            grad.view(-1)[0] = fault
            return


def spoil_backward(model: nn.Module, fault: float) -> torch.utils.hooks.RemovableHandle:
    """Before the reduction, for frameworks that keep gradients to themselves: it spreads to all
    ranks."""
    param = next(p for p in model.parameters() if p.requires_grad)

    def spoilt(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad.view(-1)[0] = fault
        return grad

    return param.register_hook(spoilt)
