"""FSDP2 beside tensor parallelism, with a norm that no plan names:
torchrun --standalone --nproc-per-node 2 examples/fsdp2_tp.py"""

import copy
import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import distclip


def main():
    tensor_parallel = 2
    mesh = init_device_mesh(
        "cpu",
        (dist.get_world_size() // tensor_parallel, tensor_parallel),
        mesh_dim_names=("data", "tensor"),
    )
    torch.manual_seed(0)
    inner = [nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)]
    model = nn.Sequential(nn.LayerNorm(16), *inner, nn.Linear(16, 1))
    whole = copy.deepcopy(model)  # the same model, not shared out: what the norm should be
    plan = {"1": ColwiseParallel(), "3": RowwiseParallel()}  # and nothing for "0" and "4"
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = distclip.GradClipper(model, max_norm=0.1)

    torch.manual_seed(1 + mesh["data"].get_local_rank())  # tensor ranks read the same data
    x = torch.randn(32, 16)
    for net in (model, whole):
        (net(x) - x.sum(1, keepdim=True)).square().mean().backward()
    for p in whole.parameters():
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()
    report = clipper.step(optimizer)
    if dist.get_rank() == 0:
        print(clipper.plan)
        right = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters()])
        print(f"norm {report.total_norm:.5f}; of the model that is not shared out {right:.5f}")


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    main()
    gc.collect()  # wrapped models go before their process groups do
    dist.destroy_process_group()
