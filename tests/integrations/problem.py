"""The problem that every integration is tried on, and its float64 oracle in one process. Imported
by the scripts beside it."""

from contextlib import nullcontext
from copy import deepcopy

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

TINY, HUGE = 1e-9, 1e9


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))


def data(seed, rows=8, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, 6, generator=source) * 4).to(dtype), torch.randn(
        rows, 4, generator=source
    ).to(dtype)


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def whole(model):
    """Parameters by name, full, float64."""
    fsdp1 = isinstance(model, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(model) if fsdp1 else nullcontext():
        named = [
            (n.replace("_fsdp_wrapped_module.", "").removeprefix("module."), p)
            for n, p in model.named_parameters()
        ]
        return {
            n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone().double()
            for n, p in named
        }


def oracle(model, x, y, asked=lambda name: True):
    """Gradients by name, and the norm of those asked for."""
    model = deepcopy(model).double()
    loss_of(model, x.double(), y.double()).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    return grads, torch.linalg.vector_norm(
        torch.stack([g.norm() for n, g in grads.items() if asked(n)])
    )


def off(now, before, change):
    """Largest error of a step of lr 1, relative to it; float32 parameters show a change to 6e-8 of
    themselves, which is allowed."""
    worst = 0.0
    for name in before:
        seen, wanted = before[name] - now[name], change[name]
        seen_to = 6e-8 * before[name].abs() + 6e-8 * wanted.abs()
        worst = max(
            worst, float(((seen - wanted).abs() - seen_to).clamp(min=0).norm() / wanted.norm())
        )
    return worst


def clipped(grads, norm, max_norm):
    return {n: g * min(1.0, max_norm / float(norm)) for n, g in grads.items()}


def moved(now, before):
    return max(float((now[n] - before[n]).abs().max()) for n in before)
