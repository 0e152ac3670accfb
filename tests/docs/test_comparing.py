"""The check of comparing_with_torch.md, run as it stands on the page."""

import contextlib
import io

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import distclip
from docs.blocks import blocks, marked
from parity.layouts import mesh

PAGE = "comparing_with_torch.md"


def printed(model):
    """What the block prints: how far distclip and torch are off."""
    (block,) = marked(PAGE, "runs: comparing")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        block.run({"distclip": distclip, "torch": torch, "model": model})
    return [float(number) for number in out.getvalue().split()]


def drawn(model):
    """The model, with gradients."""
    for i, p in enumerate(model.parameters()):
        grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.dtype)
        p.grad = (
            distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
            if isinstance(p, DTensor)
            else grad
        )
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_one_process(dtype):
    """4,000,000 elements: torch's part is told, not judged, since another torch may do better."""
    ours, torchs = printed(drawn(nn.Linear(2000, 2000, dtype=dtype)))
    assert abs(ours) < 1e-7 and abs(torchs) < 1e-2


def sharded():
    return printed(drawn(fully_shard(nn.Linear(300, 200), mesh=mesh(4))))


def test_under_fsdp2(ranks):
    for ours, torchs in ranks.run(sharded):
        assert abs(ours) < 1e-7 and abs(torchs) < 1e-2


def test_no_block_is_left_out():
    assert len(blocks(PAGE)) == 1 and len(blocks(PAGE)[0].code.splitlines()) == 3
