"""GradScaler over DTensors: one rank steps, the other leaves the step out.

Whether there was an overflow is agreed over the mesh dimensions of the first gradient alone. That
one is replicated here, as a norm's weight is, and the overflow lies in a shard of the second.
Shown: 1 where the rank's optimizer stepped.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import distclip
from showing import show


def run(step):
    mesh = init_device_mesh("cpu", (2,))
    norm = nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Replicate()]))
    linear = nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Shard(0)]))
    factor = distribute_tensor(torch.tensor([1.0, torch.inf]), mesh, [Shard(0)])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD([norm, linear], 1.0)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    # `.grad` as backward leaves it: the loss itself would be inf on every rank
    norm.grad, linear.grad = norm.detach() * scaler.get_scale(), factor * scaler.get_scale()
    scaler.scale(torch.zeros(()))  # which makes the scaler's state
    step(scaler, optimizer, [("norm", norm), ("linear", linear)])
    return len(steps)


def torchs(scaler, optimizer, params):
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def ours(scaler, optimizer, params):
    distclip.GradClipper(params, max_norm=1.0).step(optimizer, scaler=scaler)


def numbers():
    return {"right": 0, "GradScaler": run(torchs), "distclip": run(ours)}


if __name__ == "__main__":
    show(numbers)
