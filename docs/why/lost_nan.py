"""torch.nn.utils.clip_grad_norm_ with the inf norm under FSDP2: a NaN does not show in the norm.

The maximum over ranks leaves NaN out, so a check of the norm passes and the optimizer steps with
it. Shown: 1 where the rank is told that a gradient is not finite.
"""

import math

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import distclip
from showing import show


def numbers():
    model = fully_shard(nn.Linear(2, 2, bias=False))
    factor = torch.tensor([1.0, float("nan")])
    (model(torch.ones(1, 2)) * factor).sum().backward()  # rank 1 holds the second row
    theirs = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()], math.inf)
    clipper = distclip.GradClipper(model, max_norm=1.0, norm_type=math.inf)
    ours = clipper.measure()
    return {
        "right": 1,
        "torch": int(not theirs.full_tensor().isfinite()),
        "distclip": int(ours.nonfinite > 0),
    }


if __name__ == "__main__":
    show(numbers)
