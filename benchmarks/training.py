"""Backward and clip of small models: what clipping is of a real step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

import distclip
from benchmarks import problems
from benchmarks.records import Row, Spread
from benchmarks.single import CLIP, TORCH, rows_of
from benchmarks.timing import Contender, Effort, interleaved


def models(quick: bool) -> dict[str, tuple[nn.Module, Callable[[nn.Module], Tensor]]]:
    """Model and its loss, by name."""
    torch.manual_seed(0)
    width, batch = (32, 4) if quick else (256, 16)
    tokens = torch.randint(256, (batch, 65))
    images, labels = torch.randn(4 * batch, 28, 28), torch.randint(10, (4 * batch,))
    return {
        "small GPT": (
            problems.GPT(width, 4),
            lambda m: F.cross_entropy(m(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()),
        ),
        "LSTM": (problems.LSTM(width), lambda m: F.cross_entropy(m(images), labels)),
        "MLP": (problems.mlp(4 * width), lambda m: F.cross_entropy(m(images.flatten(1)), labels)),
    }


def training(effort: Effort, kernels: str) -> list[Row]:
    """The forward pass is not timed; each contender gets a graph of its own."""
    rows: list[Row] = []
    for name, (model, loss_of) in models(effort.quick).items():
        params = list(model.parameters())
        loss_of(model).backward()
        norm = float(distclip.get_total_norm([p.grad for p in params if p.grad is not None]))
        for state, max_norm in (("idle", 2 * norm), ("active", norm / 2)):
            clipper = distclip.GradClipper(model, max_norm)
            held: list[Tensor] = []

            def forward(
                held: list[Tensor] = held, loss_of: Callable = loss_of, model: nn.Module = model
            ) -> None:
                model.zero_grad()
                held[:] = [loss_of(model)]

            def runner(clip: Callable[[], object], held: list[Tensor] = held) -> Callable[[], None]:
                def run() -> None:
                    held[0].backward()
                    clip()

                return run

            peer, ours, alone = f"backward + {TORCH}", f"backward + {CLIP}", "backward"
            contenders = [
                Contender(
                    peer, runner(lambda p=params, m=max_norm: clip_grad_norm_(p, m)), forward
                ),
                Contender(ours, runner(clipper.clip_), forward),
                Contender(alone, runner(lambda: None), forward),
            ]
            times = interleaved(contenders, effort)
            median = {n: Spread.of(t).median for n, t in times.items()}
            note = "clipping is {:.1%} of torch's time, {:.1%} of distclip's".format(
                *(max(0.0, 1 - median[alone] / median[n]) for n in (peer, ours))
            )
            rows += rows_of(
                "training", f"{name}, {state}", times, [(peer, ours)], kernels, "", note=note
            )
    return rows
