"""Stage 7: the decision reaches the gradients, in place and at float32 precision or better. Plain torch operations: the reference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def scale_(tensors: Sequence[Tensor], factors: Sequence[float] | Tensor) -> None:
    """Multiply each local tensor by its factor, in place. One whose factor is known to be 1 is not written.

    Args:
        factors: [n] numbers, or float64 [n] on any device, of which nothing is read on the host.

    On the CPU a 0-dim float32 factor is multiplied in float32 also into bf16 and fp16; elsewhere torch would round it to the gradient's
    dtype first, so that low-precision tensors are widened, one at a time.
    """
    if isinstance(factors, Tensor):
        for tensor, factor in zip(tensors, factors.unbind(), strict=True):
            if values := _stored(tensor):
                _multiply_(values, factor.to(values[0].device, wide(values[0].dtype)))
        return
    alike: dict[tuple[torch.device, torch.dtype, float], list[Tensor]] = defaultdict(list)
    for tensor, factor in zip(tensors, factors, strict=True):
        if factor != 1:
            for values in _stored(tensor):
                alike[values.device, values.dtype, factor].append(values)
    for (device, dtype, factor), same in alike.items():
        _multiply_(same, torch.tensor(factor, dtype=torch.float64, device="cpu").to(wide(dtype)).to(device, non_blocking=True))


def _multiply_(tensors: list[Tensor], factor: Tensor) -> None:
    """`factor`: 0-dim, of the dtype in which the product is formed."""
    if tensors[0].device.type == "cpu" or factor.dtype == tensors[0].real.dtype:
        torch._foreach_mul_(tensors, factor)
        return
    for tensor in tensors:
        tensor.copy_(tensor.to(factor.dtype).mul_(factor))


def clamp_(tensors: Sequence[Tensor], values: Tensor) -> None:
    """Clamp local real tensors to [-value, value] in place; NaN stays. `values`: float64 [n] on any device."""
    for tensor, value in zip(tensors, values.unbind(), strict=True):
        if tensor.is_sparse and not tensor.is_coalesced():
            tensor.copy_(tensor.coalesce())  # the sum of equal indices is what is bounded
        for stored in _stored(tensor):
            limit = value.to(stored.device, wide(stored.dtype))
            stored.copy_(torch.minimum(torch.maximum(stored.to(limit.dtype), -limit), limit))


def drop(params: Iterable[Tensor]) -> None:
    """Take the gradients away: every optimizer leaves a parameter without one alone, its state and counters too (zeros would not)."""
    for param in params:
        param.grad = None


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient of `dtype` is multiplied."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def _stored(tensor: Tensor) -> list[Tensor]:
    """What is multiplied: a dense tensor, or a sparse one's values; nothing where it is empty."""
    values = tensor._values() if tensor.is_sparse else tensor
    return [values] if values.numel() else []
