"""A pipeline of two stages: torchrun --standalone --nproc-per-node 2 examples/pipeline.py"""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import distclip


def squared_error(out, target):
    return (out - target).square().mean()


def main():
    rank, stages = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16) for _ in range(2 * stages)]
    # named as in the whole model: different stages have different names, and nothing needs saying
    mine = nn.Sequential()
    for i in (2 * rank, 2 * rank + 1):
        mine.add_module(f"layer{i}", layers[i])
    stage = PipelineStage(mine, rank, stages, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=4, loss_fn=squared_error)
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
    clipper = distclip.GradClipper(mine, max_norm=0.25)  # [...] of several stages on this rank

    torch.manual_seed(1)
    for step in range(1, 6):
        x = torch.randn(32, 16)
        optimizer.zero_grad()
        if stage.is_first:
            schedule.step(x)
        else:
            schedule.step(target=x.flip(1))
        here = torch.nn.utils.get_total_norm([p.grad for p in mine.parameters()])
        report = clipper.step(optimizer)  # one norm of all stages, on every rank
        whole, coef = report.total_norm.item(), report.clip_coef.item()
        print(f"step {step}, stage {rank}: norm {here:.4f}, of all {whole:.4f}, times {coef:.3f}")
        dist.barrier()


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    main()
    gc.collect()  # wrapped models go before their process groups do
    dist.destroy_process_group()
