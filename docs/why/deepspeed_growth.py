"""DeepSpeed, float16 with a dynamic loss scale: half a step whenever the scale grows.

The scale is doubled before the gradients are divided by it. Shown: how far plain SGD of rate 1
moves the parameters at the step at which the scale grows.
"""

import os

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

import distclip
from showing import show

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2},
}


def moved(with_distclip):
    """At each of four steps with a gradient of length 2."""
    model = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    if with_distclip:
        distclip.integrations.deepspeed.attach(engine, max_norm=1e3)
    steps = []
    for _ in range(4):
        before = engine.module.weight.detach().float().clone()
        engine.backward(engine(torch.ones(1, 2, dtype=torch.float16)).sum())
        engine.step()
        steps.append(float((engine.module.weight.detach().float() - before).norm()))
    return steps


def numbers():
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its build takes minutes
    get_accelerator().is_fp16_supported = lambda: True  # gloo and the CPU can
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    theirs, ours = moved(False), moved(True)
    at = min(range(4), key=lambda i: theirs[i])
    return {"right": 2.0, "DeepSpeed": theirs[at], "distclip": ours[at]}


if __name__ == "__main__":
    show(numbers)
