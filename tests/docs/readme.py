"""The README's code: what a diff takes away and adds, and both sides run on a rank."""

import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from docs.setting import net, whole
from parity.oracle import total_norm

README = (Path(__file__).parents[2] / "README.md").read_text()
DIFFS = dict(re.findall(r"<!-- diff: (\w+) -->\n```diff\n(.*?)```", README, re.DOTALL))
BLOCKS = dict(re.findall(r"<!-- run: (\w+) -->\n```python\n(.*?)```", README, re.DOTALL))
LOOPS = ("ddp", "fsdp2", "amp", "accumulation")  # the others need a framework


class Sides(NamedTuple):
    """A diff as three programs."""

    before: str
    after: str
    unclipped: str  # before, without its line that clips


def sides(name):
    lines = DIFFS[name].splitlines()
    before = [line[1:] for line in lines if not line.startswith("+")]
    after = [line[1:] for line in lines if not line.startswith("-")]
    clips = r".*clip_grad_norm_\(.*"
    unclipped = [
        re.sub(
            r"(gradient_clipping\"\] =|max_grad_norm=|gradient_clip_val=)( ?)1\.0",
            r"\1\g<2>0.0",
            line,
        )
        for line in before
        if not re.match(clips, line)
    ]
    return Sides(*("\n".join(side) for side in (before, after, unclipped)))


def batches():
    """Of one rank: later ones have larger gradients, which Adam alone would not show."""
    source = torch.Generator().manual_seed(7)
    scales = (1.0, 1.0, 2.0, 2.0, 8.0, 8.0, 4.0, 4.0)
    whole_batches = [
        (torch.randn(8, 6, generator=source) * s, torch.randn(8, 4, generator=source) * s * 4)
        for s in scales
    ]
    if not dist.is_initialized():
        return whole_batches
    return [tuple(t[dist.get_rank() :: dist.get_world_size()] for t in b) for b in whole_batches]


def moved(code, name):
    """How far the program moved the parameters, flat and float64, and what it left behind."""
    model = net()
    before = whole(model.parameters())
    if dist.is_initialized() and "model = " not in code:
        model = DistributedDataParallel(model)
    names = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.01),
        "loss_fn": nn.functional.mse_loss,
        "data": batches(),
    }
    scaler = torch.amp.GradScaler
    torch.amp.GradScaler = lambda: scaler("cpu", init_scale=1024.0)  # the device that is there
    try:
        exec(compile(code, f"README.md, {name}", "exec"), names)
    finally:
        torch.amp.GradScaler = scaler
    after = whole(names["model"].parameters())
    return torch.cat([(b - a).flatten() for b, a in zip(before, after, strict=True)]), names


def compared(name):
    """On one rank: how far the sides differ, and how much the clip changes, relative to the way."""
    before, after, unclipped = sides(name)
    old, _ = moved(before, name)
    new, names = moved(after, name)
    free, _ = moved(unclipped, name)
    way = float(old.norm())
    return {
        "way": way,
        "apart": float((old - new).norm()) / way,
        "clip": float((old - free).norm()) / way,
        "report": names["clipper"].last_report.to_dict(),
        "norm": total_norm([new]).hex(),
    }
