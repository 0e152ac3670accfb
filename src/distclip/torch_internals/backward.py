"""Whether a wrapper's gradients are final, where its caller says when they are waited for (torch
2.15)."""

from __future__ import annotations

from typing import Any

from torch.nn.parallel import DistributedDataParallel


def has_reduced(module: DistributedDataParallel) -> bool:
    """DDP's: whether its reductions of this backward pass have ended."""
    try:
        module._check_reducer_finalized()
    except RuntimeError:
        return False
    return True


def fsdp2_is_unfinished(module: Any) -> tuple[bool, bool]:
    """FSDP2's, which keeps it at the root from the first forward pass on: whether it waits for its
    `finalize_backward`, and whether a handle of reductions was given out."""
    context = module._get_fsdp_state()._state_ctx
    return context.manual_backward_finalization_active, context.gradient_reduction_pending
