"""Lightning's packaged demo, a language model on its Transformer, by Trainer with DDP on two ranks."""

import recorded  # first

# isort: split
import warnings

import lightning
import torch
from lightning.pytorch.demos import LightningTransformer
from torch.utils.data import DataLoader

warnings.simplefilter("ignore")


class Demo(LightningTransformer):
    def prepare_data(self):
        """The demo's own data would be downloaded."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def on_after_backward(self):
        total = [p.grad.double().square().sum() for p in self.parameters() if p.grad is not None]
        unclipped.append(float(torch.stack(total).sum().sqrt()))


losses, unclipped = [], []
model = Demo(vocab_size=64)
rows = recorded.tokens(320, 13)
loader = DataLoader(list(zip(rows[:, :-1], rows[:, 1:])), batch_size=4)
how = {"gradient_clip_val": 0.1}  # own
if recorded.DISTCLIP:
    from distclip.integrations.lightning import GradientClipping  # distclip

    how = {"callbacks": [GradientClipping(max_norm=0.1)]}  # distclip
trainer = lightning.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_steps=recorded.STEPS, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **how,
)  # fmt: skip
trainer.fit(model, loader)
assert min(unclipped) > 0.1, "nothing is clipped"
recorded.tell(losses)
