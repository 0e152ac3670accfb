"""Accelerate, FSDP1: a part of the parameters is clipped by each rank's own norm.

`accelerator.clip_grad_norm_` with other parameters than all of the model, such as those that
train, takes the shards for whole gradients. Shown: the norm that it returns.
"""

import os

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import nn

import distclip
from showing import show


def accelerator_on_cpus():
    """Accelerate shards on accelerators alone, unless it takes the CPUs for such."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    PartialState(backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=1, use_orig_params=True, reshard_after_forward="FULL_SHARD"
    )
    return Accelerator(fsdp_plugin=plugin)


def numbers():
    accelerator = accelerator_on_cpus()
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    model[1].weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1.0))

    def clipped():
        optimizer.zero_grad()
        accelerator.backward(model(torch.ones(1, 2)).sum())
        first = [p for n, p in model.named_parameters() if "0.weight" in n]  # 3, 3, 4 and 4
        return float(accelerator.clip_grad_norm_(first, 1.0))

    theirs = clipped()
    distclip.integrations.accelerate.prepare(accelerator, model, max_norm=1.0)
    return {"right": (3**2 * 2 + 4**2 * 2) ** 0.5, "Accelerate": theirs, "distclip": clipped()}


if __name__ == "__main__":
    show(numbers)
