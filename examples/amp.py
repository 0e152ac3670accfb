"""float16 with a GradScaler, and an overflow on one rank:
torchrun --standalone --nproc-per-node 2 examples/amp.py"""

import gc
import logging

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distclip


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rank = dist.get_rank()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # "cuda" on GPUs
    clipper = distclip.GradClipper(model, max_norm=1.0, sinks=[distclip.LoggingSink()])

    torch.manual_seed(1 + rank)
    for step in range(1, 7):
        x = torch.randn(32, 16)
        with torch.autocast("cpu", torch.float16):
            out = model(x)
        loss = (out.float() - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if step == 4 and rank == 1:
            net[0].bias.grad[0] = torch.inf  # as if it had overflowed, on this rank alone
        # in place of unscale_, clip, scaler.step and scaler.update
        report = clipper.step(optimizer, scaler=scaler)
        print(f"rank {rank}: skipped {report.skipped.item()}, scale {scaler.get_scale():g}")
        dist.barrier()


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    main()
    gc.collect()  # wrapped models go before their process groups do
    dist.destroy_process_group()
