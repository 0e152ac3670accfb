"""The one training program that every launcher starts:

torchrun --standalone --nproc-per-node 2 launch/train.py --config configs/fsdp2.yaml --training.lr 0.001
"""

from __future__ import annotations

import gc
import logging
import math
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from tqdm import tqdm

import distclip
from checkpoint import Run, resume, save
from config import Config, read
from data import Batches, drawn_images, idx_images, temporal_order, text
from models import GPT, Recurrent, RowLSTM
from strategies import Spread, spread_model


def make_model(config: Config) -> nn.Module:
    torch.manual_seed(config.training.seed)
    return {"recurrent": Recurrent, "lstm": RowLSTM, "gpt": GPT}[config.model]()


def make_data(config: Config) -> Batches:
    if {"recurrent": "temporal_order", "lstm": "images", "gpt": "text"}[config.model] != config.data.name:
        sys.exit(
            f"data.name={config.data.name!r} does not fit model={config.model!r}; recurrent reads temporal_order, lstm images, gpt text"
        )
    if config.data.name == "images":
        return idx_images(config.data.folder, config.data.seed) if config.data.folder else drawn_images(config.data.seed)
    return (temporal_order if config.data.name == "temporal_order" else text)(config.data.seed)


def make_clipper(model: nn.Module, config: Config) -> distclip.GradClipper:
    sinks: list[distclip.Sink] = [distclip.LoggingSink()]  # on the console only what is skipped
    if config.output.log:
        sinks.append(distclip.JSONLSink(config.output.log))
    clip = config.clip
    if clip.mode == "none":  # a scaler must skip what overflows
        on_nonfinite = "skip" if config.training.precision == "fp16" else "propagate"
        return distclip.GradClipper(model, math.inf, on_nonfinite=on_nonfinite, sinks=sinks)
    rule = {"norm": distclip.FixedNorm, "value": distclip.FixedValue, "normalize": distclip.Normalize}[clip.mode]
    return distclip.GradClipper(model, policy=rule(clip.threshold), on_nonfinite=clip.on_nonfinite, sinks=sinks)


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    make = torch.optim.SGD if config.training.optimizer == "sgd" else torch.optim.AdamW
    return make(model.parameters(), config.training.lr)


def rate(step: int, config: Config) -> float:
    """Linear warm-up, then cosine decay to 0, as a factor of the learning rate."""
    warmup, steps = config.training.warmup, config.training.steps
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def forward_backward(spread: Spread, scaler: torch.amp.GradScaler, x: Tensor, y: Tensor, accumulate: int) -> Tensor:
    """Gradients of the mean loss over this rank's part, in micro-steps, times the scaler's scale; returns that loss."""
    total = torch.zeros((), device=x.device)
    for i, (part, target) in enumerate(zip(x.chunk(accumulate), y.chunk(accumulate), strict=True)):
        with spread.micro_step(i == accumulate - 1):
            with spread.precision():
                logits = spread.model(part)
            loss = F.cross_entropy(logits.float().flatten(0, -2), target.flatten()) / accumulate
            scaler.scale(loss).backward()
        total += loss.detach()
    return total


def inject(config: Config, step: int, rank: int, model: nn.Module) -> None:
    """Spoil one gradient element of one rank, to see what happens."""
    if config.inject.kind == "none" or step != config.inject.step or rank != config.inject.rank:
        return
    for param in model.parameters():
        grad = param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad
        if grad is not None and grad.numel():
            grad.view(-1)[0] = math.inf if config.inject.kind == "overflow" else math.nan
            return


def say_scaler(scaler: torch.amp.GradScaler, rank: int, world: int) -> None:
    states = [scaler.state_dict()] * world
    if world > 1:
        dist.all_gather_object(states, scaler.state_dict())
    if rank == 0:
        equal = "equal on all ranks" if all(state == states[0] for state in states) else f"NOT EQUAL: {states}"
        print(f"scaler: scale {scaler.get_scale():g}, {equal}")


def train(config: Config, device: str) -> None:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = config.training.batch // world
    if share * world != config.training.batch or share % config.training.accumulate:
        sys.exit(f"training.batch={config.training.batch} does not divide by {world} ranks x {config.training.accumulate} micro-steps")
    batches = make_data(config)
    spread = spread_model(config.strategy, make_model(config).to(device), config.training.precision, device)
    clipper = make_clipper(spread.model, config)
    optimizer = make_optimizer(spread.model, config)
    scaler = torch.amp.GradScaler(device, enabled=config.training.precision == "fp16", growth_interval=200)
    run = Run(spread.model, optimizer, clipper, scaler)
    if rank == 0:
        print(clipper.plan)
    folder = config.output.checkpoint
    start = resume(folder, run) if folder else 0

    bar = tqdm(range(start, config.training.steps), disable=rank != 0, mininterval=0.5, ncols=80)
    for step in bar:
        x, y = (t[rank * share : (rank + 1) * share].to(device) for t in batches(step, config.training.batch))
        for group in optimizer.param_groups:
            group["lr"] = config.training.lr * rate(step, config)
        optimizer.zero_grad()
        loss = forward_backward(spread, scaler, x, y, config.training.accumulate)
        inject(config, step, rank, spread.model)
        report = clipper.step(optimizer, scaler=scaler)
        if rank == 0 and (step % 20 == 0 or step == config.training.steps - 1):
            bar.set_postfix(loss=f"{loss.item():.4f}", norm=f"{report.total_norm.item():.3g}")
        if folder and ((step + 1) % config.output.every == 0 or step + 1 == config.training.steps):
            save(folder, step + 1, run)
    if scaler.is_enabled():
        say_scaler(scaler, rank, world)


def main() -> None:
    config = read(sys.argv[1:])
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "RANK" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    elif config.strategy != "single":
        sys.exit(f"strategy: {config.strategy!r} needs a launcher: torchrun --standalone --nproc-per-node 2 launch/train.py ...")
    try:
        train(config, device)
    finally:
        if dist.is_initialized():
            # a model that outlives its process groups leaves work to gloo's threads, which abort when the interpreter ends under them
            gc.collect()
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
