"""What every fixture's page assumes: a model, its data on four ranks, and how far a step of lr 1
moved it."""

import torch
import torch.distributed as dist
from torch import nn

from parity.oracle import total_norm

ROWS = 8


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))


def batch():
    source = torch.Generator().manual_seed(3)
    return torch.randn(ROWS, 6, generator=source) * 4, torch.randn(ROWS, 4, generator=source) * 4


def mine(t):
    return t[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else t


def loss_of(model):
    x, y = batch()
    if isinstance(model, list):  # parts of a model
        out = mine(x)
        for part in model:
            out = part(out)
        return (out - mine(y)).square().mean()
    return (model(mine(x)) - mine(y)).square().mean()


def gradients(model=None):
    """By name, of the whole batch in one process, float64."""
    model = (model or net()).double()
    x, y = (t.double() for t in batch())
    (model(x) - y).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def whole(params):
    return [
        (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().double().clone()
        for p in params
    ]


def length(before, after):
    """Of the step."""
    return total_norm([b - a for b, a in zip(before, after, strict=True)])
