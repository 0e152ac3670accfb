"""Gradients on a CUDA device, of random numbers, and how they are set back."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks import problems
from benchmarks.problems import Shapes

LLAMA = 1_536_066_816


def llama(quick: bool) -> Shapes:
    """20 layers of a Llama of width 2048, with a vocabulary (and a last norm) that make `LLAMA`
    elements in all."""
    if quick:
        return [(2048, 256), (256, 256), (256,)]
    width, key, inner = 2048, 512, 8192
    layer = [(width, width), (key, width), (key, width), (width, width)]
    layer += [(inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [(156_071, width), *(layer * 20), (3_328,)]


def mixed(quick: bool) -> Shapes:
    """500 matrices of 225 million elements, from 64 x 64 to 4096 x 4096."""
    draw = random.Random(0)
    shapes = [
        (2 ** draw.randint(6, 12), 2 ** draw.randint(6, 12)) for _ in range(10 if quick else 500)
    ]
    if not quick:
        least = sum(a * b for a, b in shapes)
        factor = (225e6 / least) ** 0.5
        shapes = [(max(1, round(a * factor)), max(1, round(b * factor))) for a, b in shapes]
    return shapes


def small(count: int, quick: bool) -> Shapes:
    return [(64, 16)] * (100 if quick else count)


def gpt2(quick: bool) -> Shapes:
    return problems.gpt2(quick)


def parameters(shapes: Shapes, dtypes: Sequence[torch.dtype]) -> list[nn.Parameter]:
    """Parameters with random gradients of norm about 1, of the dtypes in turn."""
    total = sum(torch.Size(shape).numel() for shape in shapes)
    draw = torch.Generator("cuda").manual_seed(0)
    out = []
    for i, shape in enumerate(shapes):
        param = nn.Parameter(torch.zeros(shape, dtype=dtypes[i % len(dtypes)], device="cuda"))
        param.grad = torch.empty_like(param).normal_(0, total**-0.5, generator=draw)
        out.append(param)
    return out


def restorer(tensors: Sequence[Tensor]) -> Callable[[], object]:
    kept = [t.clone() for t in tensors]
    return lambda: torch._foreach_copy_(list(tensors), kept)
