"""Stage 7: the decision reaches the gradients, in place and at float32 precision or better."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply local tensors by a 0-dim float64 `factor`, in place. No host sync.

    The factor is a 0-dim tensor of float32 or wider: torch's kernels then multiply bf16 and fp16 in float32 instead of rounding
    the factor to the gradient's dtype first.
    """
    for (device, dtype), same in _alike(tensors).items():
        wide = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
        torch._foreach_mul_(same, factor.to(device, wide))


def clamp_(tensors: Sequence[Tensor], value: Tensor) -> None:
    """Clamp local real tensors to [-value, value] in place; NaN stays. `value`: 0-dim float64."""
    for tensor in (t for same in _alike(tensors, coalesce=True).values() for t in same):
        limit = value.to(tensor.device, torch.promote_types(tensor.dtype, torch.float32))
        tensor.copy_(torch.minimum(torch.maximum(tensor.to(limit.dtype), -limit), limit))


def drop(params: Iterable[Tensor]) -> None:
    """Take the gradients away: every optimizer leaves a parameter without one alone, its state and counters too (zeros would not)."""
    for param in params:
        param.grad = None


def _alike(tensors: Sequence[Tensor], coalesce: bool = False) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """Dense tensors by device and dtype; a sparse one by its values (which must be unique for anything that is not linear)."""
    out: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.is_sparse:
            if coalesce and not tensor.is_coalesced():
                whole = tensor.coalesce()
                tensor.copy_(whole)
            tensor = tensor._values()
        if tensor.numel():
            out[tensor.device, tensor.dtype].append(tensor)
    return out
