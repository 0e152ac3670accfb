"""Lightning: torchrun --standalone --nproc-per-node 2 examples/with_lightning.py
(or plain python: Lightning then starts the ranks)"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import distclip


class Regression(LightningModule):
    def __init__(self, clipping):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
        self.clipping = clipping

    def training_step(self, batch, index):
        x, y = batch
        return (self.net(x) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def on_train_batch_end(self, outputs, batch, index):
        report = self.clipping.clippers[0].last_report
        norm, coef = report.total_norm.item(), report.clip_coef.item()
        loss = outputs["loss"].item()
        if self.global_rank == 0:
            print(f"step {index + 1:2}: loss {loss:6.2f}, norm {norm:6.3f}, times {coef:.3f}")


def main():
    seed_everything(0)
    x = torch.randn(320, 16)
    batches = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16)
    clipping = distclip.integrations.lightning.GradientClipping(max_norm=1.0)
    trainer = Trainer(
        callbacks=[clipping],  # new, in place of gradient_clip_val
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Regression(clipping), batches)


if __name__ == "__main__":
    main()
