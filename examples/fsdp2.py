"""FSDP2 (fully_shard): torchrun --standalone --nproc-per-node 2 examples/fsdp2.py"""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distclip


def main():
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    clipper = distclip.GradClipper(model, max_norm=1.0)  # on all ranks, after sharding
    if rank == 0:
        print(clipper.plan)  # who holds what

    torch.manual_seed(1 + rank)
    for step in range(1, 6):
        x = torch.randn(32, 16)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        here = sum(p.grad.to_local().square().sum() for p in model.parameters()).sqrt()
        report = clipper.step(optimizer)
        whole = report.total_norm.item()
        print(f"step {step}, rank {rank}: norm of the shards here {here:.4f}, of all {whole:.4f}")
        dist.barrier()


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    main()
    gc.collect()  # wrapped models go before their process groups do
    dist.destroy_process_group()
