"""Gradients to float64 power sums: the mathematics of a norm, without any notion of a rank. Plain torch operations: the reference.

Nothing here communicates, and callers have turned autograd off. On the CPU large float32 tensors are read in rows of 64 by torch's
vectorised norm, and the rows are summed in float64; what float32 cannot hold is read again in float64. On other devices everything is
computed in float64 by the device, without a host read and without a branch on values.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from distclip.errors import GradientError

_UP_TO_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)
ROW = 64
CHUNK = 1 << 20
SMALL = 64  # up to here a float64 norm costs less than rows do
MODEST = 1024  # and up to here, where there are no rows, less than Python's work for each
# Flushed or subnormal squares cost a row at most 64 * 2^-126 < 1e-36, which is 1e-9 of this.
ROW_FLOOR = 1e-27


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
        compute = _sums_on_cpu if device.type == "cpu" else _sums_on_device
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
        for chunk in _chunks(_values(tensor)) if tensor.numel() else ():
            x = chunk.double()
            c = torch.minimum(torch.maximum(x, -limit), limit)
            sizes = torch.stack([_power_sum(x.abs(), p), _power_sum(c.abs(), p)])
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
    return _powers(torch.stack([norm for norm in norms if norm is not None]), p)


class _Room:
    """float32 [CHUNK + ROW], made when first needed. A new copy of each chunk would cost more in page faults than its sum."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def _of(self, count: int) -> Tensor:
        if self._memory is None:
            self._memory = torch.empty(CHUNK + ROW, dtype=torch.float32, device="cpu")
        return self._memory[:count]

    def wide(self, chunk: Tensor) -> Tensor:
        """The 1-D chunk, up to float32, in float32."""
        return chunk if chunk.dtype == torch.float32 else self._of(chunk.numel()).copy_(chunk)

    def joined(self, parts: list[Tensor]) -> Tensor:
        """1-D parts of one dtype, side by side in float32."""
        if parts[0].dtype != torch.float32:
            return self.wide(torch.cat(parts))
        return torch.cat(parts, out=self._of(sum(map(Tensor.numel, parts))))


def _sums_on_cpu(tensors: list[Tensor], p: float) -> Tensor:
    """[n] float64: small tensors in one call, middling ones with their rows put together, each large one in chunks."""
    sums: list[float] = [0.0] * len(tensors)
    room = _Room()
    small: list[int] = []
    middling: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        count, rows = tensor.numel(), _has_rows(tensor, p)
        if count <= (SMALL if rows else MODEST):
            small.append(index)
        elif rows and count <= CHUNK:
            middling.setdefault(tensor.dtype, []).append(index)
    if small:
        for index, value in zip(small, _sums_on_device([tensors[i] for i in small], p).tolist(), strict=True):
            sums[index] = value
    for same in middling.values():
        for index, value in zip(same, _sums_of_rows([tensors[i] for i in same], p, room), strict=True):
            sums[index] = value
    for index in set(range(len(tensors))).difference(small, *middling.values()):
        sums[index] = _combine([_chunk_sum(chunk, p, room) for chunk in _chunks(tensors[index])], p)
    return torch.tensor(sums, dtype=torch.float64, device="cpu")


def _has_rows(tensor: Tensor, p: float) -> bool:
    return tensor.dtype in _UP_TO_FLOAT32 and p in (2, math.inf) and tensor.is_contiguous()


def _sums_of_rows(tensors: list[Tensor], p: float, room: _Room) -> list[float]:
    """Of contiguous tensors of one dtype up to float32, put side by side CHUNK elements at a time: a call for each would cost more."""
    rows = [-(-tensor.numel() // ROW) for tensor in tensors]
    sums: list[float] = []
    while len(sums) < len(tensors):
        start, end, size = len(sums), len(sums), 0
        while end < len(tensors) and size + rows[end] * ROW <= CHUNK + ROW:
            size, end = size + rows[end] * ROW, end + 1
        sums += _sums_of_batch(tensors[start:end], rows[start:end], p, room)
    return sums


def _sums_of_batch(tensors: list[Tensor], rows: list[int], p: float, room: _Room) -> list[float]:
    """Each tensor fills so many rows, the last one with zeros."""
    filler = _filler(tensors[0].dtype)
    parts: list[Tensor] = []
    for tensor, count in zip(tensors, rows, strict=True):
        parts.append(tensor if tensor.ndim == 1 else tensor.view(-1))
        if short := count * ROW - tensor.numel():
            parts.append(filler[short])
    norms = torch.linalg.vector_norm(room.joined(parts).view(-1, ROW), p, dim=1).double()
    owner = torch.arange(len(rows), device="cpu").repeat_interleave(torch.tensor(rows, device="cpu"))
    bodies = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
    bodies = bodies.scatter_reduce_(0, owner, norms, "amax") if p == math.inf else bodies.index_add_(0, owner, norms * norms)
    return [_redone(x, count, body, p) for x, count, body in zip(tensors, rows, bodies.tolist(), strict=True)]


@lru_cache(maxsize=8)
def _filler(dtype: torch.dtype) -> list[Tensor]:
    """Zeros of each length up to a row's."""
    zeros = torch.zeros(ROW, dtype=dtype, device="cpu")
    return [zeros[:length] for length in range(ROW)]


def _redone(flat: Tensor, rows: int, body: float, p: float) -> float:
    """The sum of so many rows, read again in float64 where float32 cannot hold it."""
    if p == math.inf or rows * ROW_FLOOR <= body < math.inf or (body == 0 and not flat.any()):
        return body
    return _exact_sum(flat.reshape(-1), p)


def _combine(parts: list[float], p: float) -> float:
    if p == math.inf:
        return math.nan if any(math.isnan(part) for part in parts) else max(parts)
    return sum(parts)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Contiguous 1-D pieces of at most CHUNK elements: views where some order of the dimensions is contiguous."""
    ordered = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    if ordered.is_contiguous():
        yield from ordered.view(-1).split(CHUNK)
    elif tensor.numel() <= CHUNK:
        yield tensor.reshape(-1)
    else:
        longest = max(range(tensor.ndim), key=tensor.size)
        for half in tensor.chunk(2, dim=longest):
            yield from _chunks(half)


def _chunk_sum(chunk: Tensor, p: float, room: _Room) -> float:
    """The power sum of a contiguous 1-D piece of any dtype."""
    exact = chunk.is_complex() or chunk.dtype == torch.float64 or p not in (2, math.inf)
    if exact:
        return _exact_sum(chunk, p)
    chunk = room.wide(chunk)
    whole = chunk.numel() // ROW * ROW
    if not whole:
        return _exact_sum(chunk, p)
    body = _redone(chunk[:whole], whole // ROW, _row_sum(chunk[:whole].view(-1, ROW), p), p)
    return body if whole == chunk.numel() else _combine([body, _exact_sum(chunk[whole:], p)], p)


def _row_sum(rows: Tensor, p: float) -> float:
    """The power sum of float32 [n, ROW], each row reduced in float32."""
    norms = torch.linalg.vector_norm(rows, p, dim=1).double()
    return float(norms.amax() if p == math.inf else _powers(norms, p).sum())


def _exact_sum(chunk: Tensor, p: float) -> float:
    """The power sum of a piece of any dtype, all in float64."""
    size = chunk.to(torch.complex128).abs() if chunk.is_complex() else chunk.double().abs()
    return float(_power_sum(size, p))


def _power_sum(size: Tensor, p: float) -> Tensor:
    """[]: of float64 absolute values."""
    return size.amax() if p == math.inf else _powers(size, p).sum()


def _powers(size: Tensor, p: float) -> Tensor:
    """`size` to the p: float64 of the same shape; `size` itself for p = 1 and inf."""
    if p == math.inf or p == 1:
        return size
    return size * size if p == 2 else size.pow(p)
