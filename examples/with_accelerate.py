"""Accelerate: torchrun --standalone --nproc-per-node 2 examples/with_accelerate.py
(or accelerate launch)"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import distclip


def main():
    accelerator = Accelerator(cpu=True)  # Accelerator() on GPUs
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(320, 16)
    batches = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16)

    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    clipper = distclip.integrations.accelerate.prepare(accelerator, model, max_norm=1.0)  # new

    for step, (x, y) in enumerate(batches, 1):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)  # as before; distclip clips in here
        optimizer.step()
        report = clipper.last_report
        norm, coef = report.total_norm.item(), report.clip_coef.item()
        accelerator.print(f"step {step:2}: loss {loss:6.2f}, norm {norm:6.3f}, times {coef:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
