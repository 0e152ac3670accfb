"""Experts, one on each rank, behind layers that all ranks share:
torchrun --standalone --nproc-per-node 2 examples/experts.py"""

import gc

import torch
import torch.distributed as dist
from torch import nn

import distclip


class WithExpert(nn.Module):
    """Each rank's expert sees this rank's tokens: a router would send them there."""

    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = nn.Linear(16, 32), nn.Linear(32, 1)
        torch.manual_seed(1 + rank)
        self.expert = nn.Linear(32, 32)

    def forward(self, x):
        h = self.before(x)
        return self.after(h + torch.relu(self.expert(h)))


def main():
    rank, size = dist.get_rank(), dist.get_world_size()
    model = WithExpert(rank)
    shared = [*model.before.parameters(), *model.after.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    # one name on all ranks, and another parameter on each; where several ranks hold copies of an
    # expert, their process group stands in the place of PRIVATE
    clipper = distclip.GradClipper(
        model, max_norm=1.0, replicated_over={"expert.*": distclip.PRIVATE}
    )
    if rank == 0:
        print(clipper.plan)

    torch.manual_seed(10 + rank)
    for step in range(1, 6):
        x = torch.randn(32, 16)
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        for p in shared:
            dist.all_reduce(p.grad.div_(size))
        report = clipper.step(optimizer)
        own = torch.nn.utils.get_total_norm([p.grad for p in model.expert.parameters()])
        whole = report.total_norm.item()
        print(f"step {step}, rank {rank}: its expert after clipping {own:.4f}, norm {whole:.4f}")
        dist.barrier()


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    main()
    gc.collect()  # wrapped models go before their process groups do
    dist.destroy_process_group()
