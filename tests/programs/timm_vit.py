"""timm's loop: a small vision transformer, its optimizer factory and its clipping by norm, in
one process."""

import recorded  # first

# isort: split
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import dispatch_clip_grad

model = timm.create_model(
    "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3,
    num_classes=10,
)  # fmt: skip
optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
if recorded.DISTCLIP:
    import distclip  # distclip

    clipper = distclip.GradClipper(model, max_norm=0.5)  # distclip

source = torch.Generator().manual_seed(1)
losses = []
for _ in range(recorded.STEPS):
    images = torch.randn(8, 3, 32, 32, generator=source)
    labels = torch.randint(10, (8,), generator=source)
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    if recorded.DISTCLIP:
        clipper.step(optimizer)  # distclip
    else:
        dispatch_clip_grad(model.parameters(), 0.5, mode="norm")  # own
        optimizer.step()  # own
    losses.append(loss.detach())
recorded.tell(losses)
