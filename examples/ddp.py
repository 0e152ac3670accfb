"""DistributedDataParallel: torchrun --standalone --nproc-per-node 2 examples/ddp.py"""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distclip


def main():
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    clipper = distclip.GradClipper(model, max_norm=1.0)  # on all ranks, after wrapping

    torch.manual_seed(1 + rank)
    for step in range(1, 11):
        x = torch.randn(32, 16)  # each rank reads data of its own
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        report = clipper.step(optimizer)  # in place of optimizer.step()
        if rank == 0:
            norm, coef = report.total_norm.item(), report.clip_coef.item()
            print(f"step {step:2}: loss {loss.item():6.2f}, norm {norm:6.3f}, times {coef:.3f}")
    if rank == 0:
        print(f"clipped at {report.clip_rate.item():.0%} of the steps")


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    main()
    gc.collect()  # wrapped models go before their process groups do
    dist.destroy_process_group()
