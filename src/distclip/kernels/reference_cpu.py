"""Power sums on the CPU by torch's operations, in float64 or as good. Nothing here communicates.

Large float32 tensors are read in rows of 64 by torch's vectorised norm, and the rows are summed in
float64; what float32 cannot hold is recomputed in float64. Low precision is widened a chunk at a
time, small tensors are concatenated.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

_UP_TO_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)
ROW = 64
CHUNK = 1 << 20
FLOAT64_CHUNK = 1 << 18  # elements in float64 at a time
# up to here float64 costs less than to fill up the last row, or than a call for each
SMALL_NUMEL = 2048
# Flushed or subnormal squares cost a row at most 64 * 2^-126 < 1e-36, which is 1e-9 of this.
ROW_FLOOR = 1e-27


class _ChunkWorkspace:
    """Memory for one chunk, made when first needed: new copies of each chunk would cost more in
    page faults than its sum."""

    def __init__(self) -> None:
        self._single, self._double = (
            torch.empty(0, dtype=torch.float32, device="cpu"),
            torch.empty(0, dtype=torch.float64, device="cpu"),
        )

    def to_float32(self, chunk: Tensor) -> Tensor:
        """The 1-D chunk, up to float32, in float32."""
        return (
            chunk
            if chunk.dtype == torch.float32
            else self._float32_buffer(chunk.numel()).copy_(chunk)
        )

    def join_parts(self, parts: list[Tensor]) -> Tensor:
        """1-D parts of one dtype, up to CHUNK + ROW elements, concatenated: float32, or float64 if
        they are."""
        if parts[0].dtype != torch.float32:
            whole = torch.cat(parts)
            return whole if whole.dtype == torch.float64 else self.to_float32(whole)
        return torch.cat(parts, out=self._float32_buffer(sum(map(Tensor.numel, parts))))

    def float64_powers(self, values: Tensor, p: float) -> Tensor:
        """float64 |x|^p of up to FLOAT64_CHUNK elements."""
        if not self._double.numel():
            self._double = torch.empty(FLOAT64_CHUNK, dtype=torch.float64, device="cpu")
        size = self._double[: values.numel()].copy_(values)
        return size.mul_(size) if p == 2 else size.abs_() if p == 1 else size.abs_().pow_(p)

    def _float32_buffer(self, count: int) -> Tensor:
        if not self._single.numel():
            self._single = torch.empty(CHUNK + ROW, dtype=torch.float32, device="cpu")
        return self._single[:count]


def sums_on_cpu(tensors: list[Tensor], p: float) -> Tensor:
    """[n] float64: small and middling tensors concatenated, each large one in chunks."""
    sums: list[float] = [0.0] * len(tensors)
    workspace = _ChunkWorkspace()
    lone: list[int] = []
    small: dict[tuple[torch.dtype, int], list[int]] = {}
    middling: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        count, dtype = tensor.numel(), tensor.dtype
        if count > CHUNK or dtype.is_complex or not tensor.is_contiguous():
            lone.append(index)
        elif dtype in _UP_TO_FLOAT32 and (
            p == math.inf or (p == 2 and (count > SMALL_NUMEL or count % ROW == 0))
        ):
            middling.setdefault(dtype, []).append(index)
        elif count <= SMALL_NUMEL and p != math.inf:
            small.setdefault((dtype, count), []).append(index)
        else:
            lone.append(index)
    for several, compute in ((small, _sums_of_equals), (middling, _sums_of_rows)):
        for same in several.values():
            flat = [t if (t := tensors[index]).ndim == 1 else t.view(-1) for index in same]
            for index, value in zip(same, compute(flat, p, workspace), strict=True):
                sums[index] = value
    for index in lone:
        sums[index] = _combine_sums(
            [_chunk_sum(chunk, p, workspace) for chunk in iter_chunks(tensors[index])], p
        )
    return torch.tensor(sums, dtype=torch.float64, device="cpu")


def _split_batches(sizes: list[int], most: int) -> Iterator[slice]:
    """Slices of neighbours whose sizes add up to at most `most`; at least one entry in each."""
    start = total = 0
    for end, size in enumerate(sizes):
        if total + size > most and end > start:
            yield slice(start, end)
            start, total = end, 0
        total += size
    yield slice(start, len(sizes))


def _sums_of_equals(tensors: list[Tensor], p: float, workspace: _ChunkWorkspace) -> list[float]:
    """Power sums of small 1-D tensors of one dtype and size, finite p, all in float64: padding to
    whole rows would cost more."""
    count = tensors[0].numel()
    sums: list[float] = []
    for batch in _split_batches([count] * len(tensors), FLOAT64_CHUNK):
        sums += (
            workspace.float64_powers(workspace.join_parts(tensors[batch]), p)
            .view(-1, count)
            .sum(1)
            .tolist()
        )
    return sums


def _sums_of_rows(tensors: list[Tensor], p: float, workspace: _ChunkWorkspace) -> list[float]:
    """Power sums of 1-D tensors of one dtype up to float32, p = 2 or inf, concatenated: a call for
    each would cost more."""
    rows = [-(-tensor.numel() // ROW) for tensor in tensors]
    sums: list[float] = []
    for batch in _split_batches([count * ROW for count in rows], CHUNK + ROW):
        sums += _sums_of_batch(tensors[batch], rows[batch], p, workspace)
    return sums


def _sums_of_batch(
    tensors: list[Tensor], rows: list[int], p: float, workspace: _ChunkWorkspace
) -> list[float]:
    """Each tensor fills so many rows, the last one with zeros."""
    filler = _zeros_by_length(tensors[0].dtype)
    parts: list[Tensor] = []
    for tensor, count in zip(tensors, rows, strict=True):
        parts.append(tensor)
        if short := count * ROW - tensor.numel():
            parts.append(filler[short])
    norms = torch.linalg.vector_norm(workspace.join_parts(parts).view(-1, ROW), p, dim=1).double()
    counts = torch.tensor(rows, device="cpu")
    owner = torch.arange(len(rows), device="cpu").repeat_interleave(counts)
    if p == math.inf:
        return (
            torch.zeros(len(rows), dtype=torch.float64, device="cpu")
            .scatter_reduce_(0, owner, norms, "amax")
            .tolist()
        )
    bodies = torch.zeros(len(rows), dtype=torch.float64, device="cpu").index_add_(
        0, owner, norms * norms
    )
    if (bodies >= counts * ROW_FLOOR).all() and bodies.amax() < math.inf:
        return bodies.tolist()
    return [
        _recompute_float64(x, count, body, p)
        for x, count, body in zip(tensors, rows, bodies.tolist(), strict=True)
    ]


@lru_cache(maxsize=8)
def _zeros_by_length(dtype: torch.dtype) -> list[Tensor]:
    """Zeros of each length up to a row's."""
    zeros = torch.zeros(ROW, dtype=dtype, device="cpu")
    return [zeros[:length] for length in range(ROW)]


def _recompute_float64(flat: Tensor, rows: int, body: float, p: float) -> float:
    """The sum of so many rows, recomputed in float64 where float32 cannot hold it."""
    if p == math.inf or rows * ROW_FLOOR <= body < math.inf or (body == 0 and not flat.any()):
        return body
    return _exact_sum(flat, p)


def _combine_sums(parts: list[float], p: float) -> float:
    if p == math.inf:
        return math.nan if any(math.isnan(part) for part in parts) else max(parts)
    return sum(parts)


def iter_chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Contiguous 1-D pieces of at most CHUNK elements: views where some order of the dimensions is
    contiguous."""
    ordered = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    if ordered.is_contiguous():
        yield from ordered.view(-1).split(CHUNK)
    elif tensor.numel() <= CHUNK:
        yield tensor.reshape(-1)
    else:
        longest = max(range(tensor.ndim), key=tensor.size)
        for half in tensor.chunk(2, dim=longest):
            yield from iter_chunks(half)


def _chunk_sum(chunk: Tensor, p: float, workspace: _ChunkWorkspace) -> float:
    """The power sum of a contiguous 1-D piece of any dtype."""
    exact = chunk.is_complex() or chunk.dtype == torch.float64 or p not in (2, math.inf)
    if exact:
        return _exact_sum(chunk, p)
    chunk = workspace.to_float32(chunk)
    whole = chunk.numel() // ROW * ROW
    if not whole:
        return _exact_sum(chunk, p)
    body = _recompute_float64(
        chunk[:whole], whole // ROW, _row_sum(chunk[:whole].view(-1, ROW), p), p
    )
    return (
        body if whole == chunk.numel() else _combine_sums([body, _exact_sum(chunk[whole:], p)], p)
    )


def _row_sum(rows: Tensor, p: float) -> float:
    """The power sum of float32 [n, ROW], each row reduced in float32."""
    norms = torch.linalg.vector_norm(rows, p, dim=1).double()
    return float(norms.amax() if p == math.inf else raise_to_p(norms, p).sum())


def _exact_sum(chunk: Tensor, p: float) -> float:
    """The power sum of a piece of any dtype, all in float64."""
    size = chunk.to(torch.complex128).abs() if chunk.is_complex() else chunk.double().abs()
    return float(power_sum(size, p))


def power_sum(size: Tensor, p: float) -> Tensor:
    """[]: of float64 absolute values."""
    return size.amax() if p == math.inf else raise_to_p(size, p).sum()


def raise_to_p(size: Tensor, p: float) -> Tensor:
    """`size` to the p: float64 of the same shape; `size` itself for p = 1 and inf."""
    if p == math.inf or p == 1:
        return size
    return size * size if p == 2 else size.pow(p)
