"""A policy of your own: torchrun --standalone --nproc-per-node 2 examples/own_policy.py"""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distclip


class TwiceTheMean:
    """A threshold at twice the running mean of each group's norm.

    Two functions that read nothing on the host: all ranks see the same norms and decide alike.
    """

    def init(self, groups, device):
        return (torch.zeros(groups, dtype=torch.float64, device=device),)

    def decide(self, norms, state):
        (mean,) = state
        limit = torch.where(mean > 0, 2 * mean, torch.inf)
        coef = torch.where(norms.per_group > limit, limit / norms.per_group, 1.0)
        clipped = coef * norms.per_group
        mean = torch.where(mean > 0, 0.9 * mean + 0.1 * clipped, clipped)
        return distclip.Scale(coef, limit), (mean,)


def main():
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clipper = distclip.GradClipper(model, policy=TwiceTheMean())

    torch.manual_seed(1 + rank)
    for step in range(1, 11):
        x = torch.randn(32, 16) * (5 if step == 6 else 1)  # one batch is another
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        report = clipper.step(optimizer)
        if rank == 0:
            norm, limit = report.total_norm.item(), report.threshold.item()
            print(
                f"step {step:2}: norm {norm:7.3f}, threshold {limit:6.3f}, "
                f"{'clipped' if report.clipped else 'as it is'}"
            )


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    main()
    gc.collect()  # wrapped models go before their process groups do
    dist.destroy_process_group()
