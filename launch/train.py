"""The one training program that every launcher starts:

torchrun --standalone --nproc-per-node 2 launch/train.py --config configs/gpt_fsdp2.yaml --training.lr 0.001
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import functional as F
from tqdm import tqdm

import distclip
from config import Config, read
from data import Batches, drawn_images, idx_images, temporal_order, text
from models import GPT, Recurrent, RowLSTM
from strategies import Spread, spread


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
    sinks = [distclip.JSONLSink(config.output.log)] if config.output.log else []
    clip = config.clip
    if clip.mode == "none":
        return distclip.GradClipper(model, math.inf, on_nonfinite="propagate", sinks=sinks)
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


def forward_backward(run: Spread, x: Tensor, y: Tensor, accumulate: int) -> Tensor:
    """Gradients of the mean loss over this rank's part, in micro-steps; returns that loss."""
    total = torch.zeros((), device=x.device)
    for i, (part, target) in enumerate(zip(x.chunk(accumulate), y.chunk(accumulate), strict=True)):
        with run.micro_step(i == accumulate - 1):
            with run.precision():
                logits = run.model(part)
            loss = F.cross_entropy(logits.float().flatten(0, -2), target.flatten()) / accumulate
            loss.backward()
        total += loss.detach()
    return total


def save(folder: str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, clipper: distclip.GradClipper) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "clipper": clipper, "step": torch.tensor(step)}
    dcp.save(state, checkpoint_id=folder)


def resume(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer, clipper: distclip.GradClipper) -> int:
    """The step to go on with: 0 where `folder` holds no checkpoint."""
    if not (Path(folder) / ".metadata").exists():
        return 0
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "clipper": clipper, "step": torch.tensor(0)}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    return int(state["step"])


def train(config: Config, device: str) -> None:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = config.training.batch // world
    if share * world != config.training.batch or share % config.training.accumulate:
        sys.exit(f"training.batch={config.training.batch} does not divide by {world} ranks x {config.training.accumulate} micro-steps")
    batches = make_data(config)
    run = spread(config.strategy, make_model(config).to(device), config.training.precision, device)
    clipper = make_clipper(run.model, config)
    optimizer = make_optimizer(run.model, config)
    if rank == 0:
        print(clipper.plan)
    folder = config.output.checkpoint
    start = resume(folder, run.model, optimizer, clipper) if folder else 0

    bar = tqdm(range(start, config.training.steps), disable=rank != 0, mininterval=0.5, ncols=80)
    for step in bar:
        x, y = (t[rank * share : (rank + 1) * share].to(device) for t in batches(step, config.training.batch))
        for group in optimizer.param_groups:
            group["lr"] = config.training.lr * rate(step, config)
        optimizer.zero_grad()
        loss = forward_backward(run, x, y, config.training.accumulate)
        report = clipper.step(optimizer)
        if rank == 0 and (step % 20 == 0 or step == config.training.steps - 1):
            bar.set_postfix(loss=f"{loss.item():.4f}", norm=f"{report.total_norm.item():.3g}")
        if folder and ((step + 1) % config.output.every == 0 or step + 1 == config.training.steps):
            save(folder, step + 1, run.model, optimizer, clipper)


def main() -> None:
    config = read(sys.argv[1:])
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
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
