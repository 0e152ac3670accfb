"""torch.nn.utils.clip_grad_norm_ on pipeline stages: each rank clips by a norm of its own.

So the stages of one model are scaled by different factors, and the step has another direction.
Experts, and whatever else a rank has for itself, are the same case. Shown: the norm by which a
rank clips.
"""

import torch
import torch.distributed as dist
from torch import nn

import distclip
from showing import show


def numbers():
    rank = dist.get_rank()
    stage = nn.ModuleDict({f"layer{rank}": nn.Linear(1, 1, bias=False)})  # this rank's of two
    (stage[f"layer{rank}"].weight * (3 + rank)).sum().backward()  # norms of 3 and 4
    clipper = distclip.GradClipper(stage, max_norm=1.0)
    ours = clipper.measure().total_norm
    theirs = torch.nn.utils.clip_grad_norm_(stage.parameters(), 1.0)
    return {"right": (3**2 + 4**2) ** 0.5, "torch": float(theirs), "distclip": float(ours)}


if __name__ == "__main__":
    show(numbers)
