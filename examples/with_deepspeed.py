"""DeepSpeed ZeRO 2: torchrun --standalone --nproc-per-node 2 examples/with_deepspeed.py
(or DeepSpeed's own launcher)"""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # leave it out on GPUs

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import distclip

CONFIG = {
    "train_micro_batch_size_per_gpu": 16,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,  # DeepSpeed's own; where nothing is said it is 1.0
}


def main():
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes minutes to compile
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)  # "nccl" on GPUs
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    clipper = distclip.integrations.deepspeed.attach(engine, max_norm=1.0)  # new

    torch.manual_seed(1 + rank)
    for step in range(1, 11):
        x = torch.randn(16, 16)
        loss = (engine(x) - x.sum(1, keepdim=True)).square().mean()
        engine.backward(loss)
        engine.step()  # distclip decides in here
        if rank == 0:
            report = clipper.last_report
            norm, coef = report.total_norm.item(), report.clip_coef.item()
            print(f"step {step:2}: loss {loss.item():6.2f}, norm {norm:6.3f}, times {coef:.3f}")
    engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
