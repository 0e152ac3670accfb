"""Saved on two ranks, resumed on one; the clipper is a Stateful as torch's checkpoints have it:
torchrun --standalone --nproc-per-node 2 examples/resume_other_world_size.py"""

import gc
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distclip


def build(shard, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    if shard:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    # a threshold that is learnt from the norms so far: the clipper has something to remember
    return model, optimizer, distclip.GradClipper(model, policy=distclip.AutoClip(50), **options)


def train(model, optimizer, clipper, steps):
    for step in steps:
        torch.manual_seed(100 + step)
        x = torch.randn(32, 16)
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        report = clipper.step(optimizer)
        norm, threshold = report.total_norm.item(), report.threshold.item()
        yield f"step {report.step}: norm {norm:.5f}, threshold {threshold:.5f}"


def main():
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    job = model, _, clipper = build(shard=True)
    list(train(*job, range(5)))
    dcp.save({"model": model.state_dict(), "clipper": clipper}, checkpoint_id=folder[0])
    on_two = list(train(*job, range(5, 8)))

    if dist.get_rank() == 0:  # as a job of one process would
        job = model, _, clipper = build(shard=False, process_group=distclip.LOCAL)
        state = {"model": model.state_dict(), "clipper": clipper}
        dcp.load(state, checkpoint_id=folder[0], no_dist=True)
        on_one = list(train(*job, range(5, 8)))
        for two, one in zip(on_two, on_one):
            print(f"on two ranks {two}\non one rank  {one}")
        assert on_one == on_two


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    main()
    gc.collect()  # wrapped models go before their process groups do
    dist.destroy_process_group()
