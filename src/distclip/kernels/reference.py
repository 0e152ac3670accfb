"""Gradients to float64 power sums: the mathematics of a norm, without any notion of a rank. Plain torch operations: the reference.

Nothing here communicates, and callers have turned autograd off. `rows` has the CPU's way. On other devices everything is computed in
float64 by the device, without a host read and without a branch on values.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distclip.errors import GradientError
from distclip.kernels.reference_cpu import chunks, power_sum, powers, sums_on_cpu

SUMMED = frozenset({  # dtypes whose elements torch can widen and add
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128, torch.complex64, torch.complex32,
})  # fmt: skip


def power_sums(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return sum |g|^p of each tensor, or max |g| where `p` is inf: float64 [len(tensors)], on the first one's device.

    Args:
        tensors: Plain local tensors (no DTensors) of any floating or complex dtype, dense or sparse, on any devices.
        p: Order of the norm, 0 < p <= 8 or inf.

    An inf or NaN among the elements makes its sum non-finite; an empty tensor gives 0 for every p. float64 gradients
    overflow where torch's norm does. Temporaries are bounded on the CPU. Raises nothing; never communicates.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    home = tensors[0].device
    values = [_values(tensor) for tensor in tensors]
    by_device: dict[torch.device, list[int]] = {}
    for index, value in enumerate(values):
        if value.numel():
            by_device.setdefault(value.device, []).append(index)
    slots = [torch.zeros((), dtype=torch.float64, device=home)] * len(values)  # put side by side there: an index would have to be sent
    for device, indices in by_device.items():
        compute = sums_on_cpu if device.type == "cpu" else _sums_on_device
        part = compute([values[index] for index in indices], p).to(home)
        if len(indices) == len(values):
            return part
        for index, value in zip(indices, part.unbind(), strict=True):
            slots[index] = value
    return torch.stack(slots)


def clamped_sums(tensors: Sequence[Tensor], values: Tensor, p: float) -> Tensor:
    """What bounding each element x to c = min(max(x, -v), v) would do: float64 [n, 6], on the first tensor's device.

    Columns: Σ|x|^p, Σ|c|^p (maxima where p is inf), Σx², Σc², Σx·c, and the number of elements that v bounds.

    Args:
        tensors: as for `power_sums`.
        values: float64 [n], v; rounded to float32 except for float64 gradients, as the clamp itself does.

    Raises:
        GradientError: a complex gradient; it has no order.
    """
    rows: list[Tensor] = []
    for tensor, value in zip(tensors, values.unbind(), strict=True):
        if tensor.is_complex():
            raise GradientError(
                f"a complex gradient of shape {tuple(tensor.shape)} has no order, so its elements cannot be clamped; clip its norm, or "
                "exempt it by groups=by_name({...: Exempt()})"
            )
        limit = value.to(tensor.device, torch.float64 if tensor.dtype == torch.float64 else torch.float32).double()
        row = torch.zeros(6, dtype=torch.float64, device=tensor.device)
        for chunk in chunks(_values(tensor)) if tensor.numel() else ():
            x = chunk.double()
            c = torch.minimum(torch.maximum(x, -limit), limit)
            sizes = torch.stack([power_sum(x.abs(), p), power_sum(c.abs(), p)])
            products = torch.stack([x.square().sum(), c.square().sum(), (x * c).sum(), (x.abs() > limit).sum().double()])
            head = torch.maximum(row[:2], sizes) if p == math.inf else row[:2] + sizes
            row = torch.cat([head, row[2:] + products])
        rows.append(row.to(tensors[0].device))
    return torch.stack(rows) if rows else torch.zeros(0, 6, dtype=torch.float64, device="cpu")


def norm_of(sums: Tensor, p: float) -> Tensor:
    """Turn float64 power sums (maxima where `p` is inf) of any shape into norms of the same shape and dtype."""
    if p == math.inf or p == 1:
        return sums.clone()
    return sums.sqrt() if p == 2 else sums.pow(1 / p)


def rounded(norms: Tensor, bits: int) -> Tensor:
    """The nearest numbers of so many bits (the leading one counted): float64 of the same shape. No host sync.

    The order in which power sums are added changes with the sharding, and their last bits with it; a decision must not. Norms of
    gradients that are all alike lie on ties more often than by chance: what is within `near` last places of one counts as one, and
    goes to even. Only the precision is bounded, not the range: inf, NaN and what would round up to inf stay as they are.
    """
    drop, given = 53 - bits, norms.view(torch.int64)
    place = min(9, drop - 4)
    near = 1 << place
    odd = given >> drop - place - 1 & 2 * near  # twice `near` where rounding down would leave an odd number
    whole = (given + odd + ((1 << drop - 1) - near) & -(1 << drop)).view(torch.float64)
    return torch.where(norms <= _largest(bits), whole, norms)


def _largest(bits: int) -> float:
    """The largest float64 of so many bits."""
    return math.ldexp(2 - 2.0 ** (1 - bits), 1023)


def _values(tensor: Tensor) -> Tensor:
    """The stored elements: those of a sparse tensor are coalesced first, since equal indices add up."""
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
    return powers(torch.stack([norm for norm in norms if norm is not None]), p)
