"""Shapes, gradients and small models that the cases share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Shapes = list[tuple[int, ...]]


def gpt2(quick: bool) -> Shapes:
    """GPT-2 124M's 148 parameters (Radford et al. 2019)."""
    vocabulary, context, width, layers = (512, 64, 64, 2) if quick else (50257, 1024, 768, 12)
    block = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width), *(block * layers), (width,), (width,)]


def small(quick: bool) -> Shapes:
    return [(1000,)] * (200 if quick else 5000)


def huge(quick: bool) -> Shapes:
    return [(1 << 16,)] * 2 if quick else [(1 << 26,)] * 3


def parameters(shapes: Shapes, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Parameters with random gradients of norm about 1."""
    total = sum(torch.Size(shape).numel() for shape in shapes)
    draw = torch.Generator().manual_seed(0)
    out = []
    for shape in shapes:
        param = nn.Parameter(torch.zeros(shape, dtype=dtype))
        param.grad = torch.empty(shape).normal_(0, total**-0.5, generator=draw).to(dtype)
        out.append(param)
    return out


def named(params: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"p{i}", p) for i, p in enumerate(params)]


def restorer(tensors: Sequence[Tensor]) -> Callable[[], object]:
    """A call that sets tensors back to what they hold now."""
    kept = [t.clone() for t in tensors]
    return lambda: torch._foreach_copy_(list(tensors), kept)


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(layers)))
        self.head = nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)))


class LSTM(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(28, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
