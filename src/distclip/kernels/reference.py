"""Gradients to float64 power sums: the mathematics of a norm, without any notion of a rank. Plain
torch operations: the reference.

Nothing here communicates, and callers have turned autograd off. `reference_cpu` does the same on
the CPU. On other devices everything is computed in float64 by the device, without a host read and
without a branch on values.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from distclip.errors import GradientError
from distclip.kernels.reference_cpu import iter_chunks, power_sum, raise_to_p, sums_on_cpu

SUMMED = frozenset({  # dtypes whose elements torch can widen and add
    torch.float64, torch.float32, torch.bfloat16, torch.float16,
    torch.complex128, torch.complex64, torch.complex32,
})  # fmt: skip


def power_sums(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return sum |g|^p of each tensor, or max |g| where `p` is inf: float64 [len(tensors)], on the
    first one's device.

    Args:
        tensors: Plain local tensors (no DTensors) of any floating or complex dtype, dense or
            sparse, on any devices.
        p: Order of the norm, 0 < p <= 8 or inf.

    An inf or NaN among the elements makes its sum non-finite; an empty tensor gives 0 for every p.
    float64 gradients overflow where torch's norm does. Temporaries are bounded on the CPU. Raises
    nothing; never communicates.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    home = tensors[0].device
    values = [_coalesced_values(tensor) for tensor in tensors]
    by_device: dict[torch.device, list[int]] = {}
    for index, value in enumerate(values):
        if value.numel():
            by_device.setdefault(value.device, []).append(index)
    # stacked on the device: an index would need a host-to-device copy
    slots = [torch.zeros((), dtype=torch.float64, device=home)] * len(values)
    for device, indices in by_device.items():
        compute = sums_on_cpu if device.type == "cpu" else _sums_on_device
        part = compute([values[index] for index in indices], p).to(home)
        if len(indices) == len(values):
            return part
        for index, value in zip(indices, part.unbind(), strict=True):
            slots[index] = value
    return torch.stack(slots)


def clamped_sums(tensors: Sequence[Tensor], values: Tensor, p: float) -> Tensor:
    """What bounding each element x to c = min(max(x, -v), v) would do: float64 [n, 6], on the first
    tensor's device.

    Columns: Σ|x|^p, Σ|c|^p (maxima where p is inf), Σx², Σc², Σx·c, and the number of elements that
    v bounds.

    Args:
        tensors: as for `power_sums`.
        values: float64 [n], v; rounded to float32 except for float64 gradients, as the clamp itself
            does.

    Raises:
        GradientError: a complex gradient; it has no order.
    """
    rows: list[Tensor] = []
    for tensor, value in zip(tensors, values.unbind(), strict=True):
        if tensor.is_complex():
            raise GradientError(
                f"a complex gradient of shape {tuple(tensor.shape)} has no order, so its elements "
                f"cannot be clamped; clip its norm, or "
                "exempt it by groups=by_name({...: Exempt()})"
            )
        limit = value.to(
            tensor.device, torch.float64 if tensor.dtype == torch.float64 else torch.float32
        ).double()
        row = torch.zeros(6, dtype=torch.float64, device=tensor.device)
        for chunk in iter_chunks(_coalesced_values(tensor)) if tensor.numel() else ():
            x = chunk.double()
            c = torch.minimum(torch.maximum(x, -limit), limit)
            sizes = torch.stack([power_sum(x.abs(), p), power_sum(c.abs(), p)])
            products = torch.stack(
                [
                    x.square().sum(),
                    c.square().sum(),
                    (x * c).sum(),
                    (x.abs() > limit).sum().double(),
                ]
            )
            head = torch.maximum(row[:2], sizes) if p == math.inf else row[:2] + sizes
            row = torch.cat([head, row[2:] + products])
        rows.append(row.to(tensors[0].device))
    return torch.stack(rows) if rows else torch.zeros(0, 6, dtype=torch.float64, device="cpu")


def _coalesced_values(tensor: Tensor) -> Tensor:
    """The stored elements: those of a sparse tensor are coalesced first, since equal indices add
    up."""
    if tensor.layout is torch.strided:
        return tensor
    return tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.values()


def _sums_on_device(tensors: list[Tensor], p: float) -> Tensor:
    """[n] float64 on the tensors' one device, computed there."""
    norms: list[Tensor | None] = [None] * len(tensors)
    real = [index for index, tensor in enumerate(tensors) if not tensor.is_complex()]
    if real:
        found = torch._foreach_norm([tensors[index] for index in real], p, dtype=torch.float64)
        for index, norm in zip(real, found, strict=True):
            norms[index] = norm
    for index, tensor in enumerate(tensors):
        if tensor.is_complex():
            norms[index] = torch.linalg.vector_norm(tensor, p, dtype=torch.complex128)
    return raise_to_p(torch.stack([norm for norm in norms if norm is not None]), p)


def scale_(tensors: Sequence[Tensor], factors: Sequence[float] | Tensor) -> None:
    """Multiply each local tensor by its factor, in place. One whose factor is known to be 1 is not
    written.

    Args:
        factors: [n] numbers, or float64 [n] on any device, of which nothing is read on the host.

    On the CPU a 0-dim float32 factor is multiplied in float32 also into bf16 and fp16; elsewhere
    torch would round it to the gradient's dtype first, so that low-precision tensors are widened,
    one at a time.
    """
    if isinstance(factors, Tensor):
        for tensor, factor in zip(tensors, factors.unbind(), strict=True):
            if values := _values_in_place(tensor):
                _multiply_all_(values, factor.to(values[0].device, compute_dtype(values[0].dtype)))
        return
    alike: dict[tuple[torch.device, torch.dtype, float], list[Tensor]] = defaultdict(list)
    for tensor, factor in zip(tensors, factors, strict=True):
        if factor != 1:
            for values in _values_in_place(tensor):
                alike[values.device, values.dtype, factor].append(values)
    for (device, dtype, factor), same in alike.items():
        # filled in there: what is copied to a device would make the host wait; in float64, since
        # torch does not fill in what a narrower dtype holds as inf
        there = torch.full((), factor, dtype=torch.float64, device=device)
        _multiply_all_(same, there.to(compute_dtype(dtype)))


def _multiply_all_(tensors: list[Tensor], factor: Tensor) -> None:
    """`factor`: 0-dim, of the dtype in which the product is formed."""
    if tensors[0].device.type == "cpu" or factor.dtype == tensors[0].real.dtype:
        torch._foreach_mul_(tensors, factor)
        return
    for tensor in tensors:
        tensor.copy_(tensor.to(factor.dtype).mul_(factor))


def clamp_(tensors: Sequence[Tensor], values: Tensor) -> None:
    """Clamp local real tensors to [-value, value] in place; NaN stays. `values`: float64 [n] on any
    device."""
    for tensor, value in zip(tensors, values.unbind(), strict=True):
        if tensor.is_sparse and not tensor.is_coalesced():
            tensor.copy_(tensor.coalesce())  # equal indices are added up before the clamp
        for stored in _values_in_place(tensor):
            limit = value.to(stored.device, compute_dtype(stored.dtype))
            stored.copy_(torch.minimum(torch.maximum(stored.to(limit.dtype), -limit), limit))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient of `dtype` is multiplied."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def _values_in_place(tensor: Tensor) -> list[Tensor]:
    """What is multiplied: a dense tensor, or a sparse one's values; nothing where it is empty."""
    values = tensor._values() if tensor.is_sparse else tensor
    return [values] if values.numel() else []
