"""Hugging Face Trainer: torchrun --standalone --nproc-per-node 2 examples/with_trainer.py"""

import tempfile

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import distclip


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, x, labels):
        return {"loss": (self.net(x) - labels).square().mean()}


def main():
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,  # leave it out on GPUs
        max_steps=10,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        max_grad_norm=1.0,  # the threshold, as before
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = torch.randn(320, 16)
    records = [{"x": x, "labels": x.sum().reshape(1)} for x in rows]
    trainer = Trainer(Regression(), arguments, train_dataset=records)
    distclip.integrations.transformers.clip_with_distclip(trainer)  # new
    trainer.train()  # logs grad_norm, clip_coef, clip_rate and clip_skipped


if __name__ == "__main__":
    main()
