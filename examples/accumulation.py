"""Gradient accumulation: torchrun --standalone --nproc-per-node 2 examples/accumulation.py"""

import gc
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distclip

MICRO_BATCHES = 4


def main():
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    clipper = distclip.GradClipper(model, max_norm=1.0)

    torch.manual_seed(1 + rank)
    for step in range(1, 6):
        optimizer.zero_grad()
        for i in range(MICRO_BATCHES):
            last = i == MICRO_BATCHES - 1
            x = torch.randn(8, 16)
            with nullcontext() if last else model.no_sync():  # reduced once, with the last
                loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
                loss.backward()  # not divided: grad_scale is, and norms are reported after it
        report = clipper.step(optimizer, grad_scale=1 / MICRO_BATCHES)
        if rank == 0:
            norm, coef = report.total_norm.item(), report.clip_coef.item()
            print(f"step {step}: norm of the mean {norm:.3f}, times {coef:.3f}")


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    main()
    gc.collect()  # wrapped models go before their process groups do
    dist.destroy_process_group()
