"""FSDP1's clip_grad_norm_: an inf norm stays in the clip of later steps.

A rank whose shard has no gradient (here it is frozen) sends a zero that is reduced in place and
kept. Shown: the 2-norm of a second step, after one with the inf norm.
"""

import math

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import distclip
from showing import show


def numbers():
    layers = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    layers[1].requires_grad_(False)  # the second half, which rank 1 holds
    model = FullyShardedDataParallel(layers, device_id=torch.device("cpu"), use_orig_params=True)
    clipper = distclip.GradClipper(model, max_norm=math.inf)
    with FullyShardedDataParallel.summon_full_params(model):
        nn.init.eye_(layers[1].weight)
    (model(torch.ones(1, 2)) * 50).sum().backward()
    model.clip_grad_norm_(math.inf, norm_type=math.inf)
    model.zero_grad()
    (model(torch.ones(1, 2)) * 1).sum().backward()  # four gradients of 1
    ours = clipper.measure().total_norm
    theirs = model.clip_grad_norm_(math.inf)
    return {"right": 2.0, "FSDP1": float(theirs), "distclip": float(ours)}


if __name__ == "__main__":
    show(numbers)
