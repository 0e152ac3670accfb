"""The device programs of `triton_lists`, in Triton's language. Imported only where triton is used.

One program works on one chunk of one tensor. A tensor's address and dtype are read from tables, so that one launch serves a list of
tensors of mixed dtypes. Loads are vectorised where an address is a multiple of 16 bytes; offsets within a tensor are 64 bits wide.
"""

# Branches on constants are compiled away, so the two sides of one may differ in type: no conditional expressions, and no `and` that mixes
# what the compiler knows with what the device reads.
# ruff: noqa: SIM102, SIM108, SIM300
# pyright: basic, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

CHUNK = 32768  # elements that one program reads: few enough programs for large lists, and a tensor of this size still has its own
BLOCK = 2048  # elements in flight: 16 a thread
WARPS = 4
LANES = 256  # partial sums in flight


@triton.jit
def _wide(x):
    """float32, or float64 for float64. bfloat16 is read as its bits, uint16: devices before sm_80 and the interpreter do not round it."""
    if x.dtype == tl.uint16:
        x = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float16:
        x = x.to(tl.float32)
    return x


@triton.jit
def _narrow(x, TYPE: tl.constexpr):
    """`_wide` undone, rounded to nearest even."""
    if TYPE == tl.uint16:
        bits = x.to(tl.uint32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        out = tl.where(x == x, even, (bits >> 16) | 0x40).to(tl.uint16)  # adding could turn a NaN into inf or 0
    else:
        out = x.to(TYPE)
    return out


@triton.jit
def _raised(size, P: tl.constexpr):
    """float64 `size` to the P: whole P by multiplication, others right to 1e-13."""
    if P == 1:
        out = size
    elif P == 2:
        out = size * size
    elif P == 3:
        out = size * size * size
    elif P == 4:
        out = size * size
        out = out * out
    else:
        out = tl.exp2(tl.log2(size) * tl.full((), P, tl.float64))
    return out


@triton.jit
def _joined(acc, x, P: tl.constexpr):
    """`acc` with |x|^P added, or for P = inf the larger bits: NaN lies above inf there, so that it stays."""
    if P == float("inf"):
        if x.dtype == tl.float64:
            acc = tl.maximum(acc, x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF)
        else:
            acc = tl.maximum(acc, _wide(x).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    else:
        acc += _raised(tl.abs(_wide(x).to(tl.float64)), P)
    return acc


@triton.jit
def _sum_of(here, count, P: tl.constexpr, BLOCK: tl.constexpr):
    """[] float64: the power sum of `count` elements from `here` on."""
    lanes = tl.arange(0, BLOCK)
    if P == float("inf"):
        if here.dtype.element_ty == tl.float64:
            acc = tl.zeros((BLOCK,), tl.int64)
        else:
            acc = tl.zeros((BLOCK,), tl.int32)
    else:
        acc = tl.zeros((BLOCK,), tl.float64)
    whole = count // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):  # without a mask, which would keep loads from being vectorised
        acc = _joined(acc, tl.load(here + at + lanes), P)
    if whole < count:
        acc = _joined(acc, tl.load(here + whole + lanes, mask=whole + lanes < count, other=0), P)
    if P == float("inf"):
        if here.dtype.element_ty == tl.float64:
            out = tl.max(acc, 0).to(tl.float64, bitcast=True)
        else:
            out = tl.max(acc, 0).to(tl.float32, bitcast=True).to(tl.float64)
    else:
        out = tl.sum(acc, 0)
    return out


@triton.jit
def _aligned(address, TYPE: tl.constexpr):
    """A pointer that the compiler knows to be a multiple of 16 bytes.

    The hint sticks to the value it is given. The masked copy is a value of its own, so that it holds wherever the compiler moves it; given
    the address itself, the hint would spread to the other branch, where it is false.
    """
    return tl.multiple_of((address & -16).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _typed_sum(address, start, count, TYPE: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    if address % 16 == 0:
        out = _sum_of(_aligned(address, TYPE) + start, count, P, BLOCK)
    else:
        out = _sum_of(address.to(tl.pointer_type(TYPE)) + start, count, P, BLOCK)
    return out


@triton.jit
def chunk_sums(
    pointers, owners, firsts, counts, codes, partials, TYPES: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """partials [chunks] float64: each chunk's sum of |x|^P, or its maximum for P = inf. A grid of one program a chunk.

    All of `triton_lists.Layout`: pointers [n] int64 (0: no tensor, its chunks give 0), owners [chunks] int32, firsts [n + 1] int64,
    counts [n] int64, codes [n] int32. TYPES: bit k is set where dtype code k occurs; only those are compiled.
    """
    chunk = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + chunk)
    address = tl.load(pointers + owner)
    start = (chunk - tl.load(firsts + owner)) * CHUNK
    count = tl.minimum(tl.load(counts + owner) - start, CHUNK).to(tl.int32)
    code = tl.load(codes + owner)
    out = tl.full((), 0, tl.float64)
    if address != 0:
        if TYPES & 1:
            if code == 0:
                out = _typed_sum(address, start, count, tl.float32, P, BLOCK)
        if TYPES & 2:
            if code == 1:
                out = _typed_sum(address, start, count, tl.float64, P, BLOCK)
        if TYPES & 4:
            if code == 2:
                out = _typed_sum(address, start, count, tl.uint16, P, BLOCK)
        if TYPES & 8:
            if code == 3:
                out = _typed_sum(address, start, count, tl.float16, P, BLOCK)
    tl.store(partials + chunk, out)


@triton.jit(do_not_specialize_on_alignment=["partials"])
def tensor_sums(partials, firsts, sums, P: tl.constexpr, BLOCK: tl.constexpr):
    """sums [n] float64 from partials [chunks], always in the same order. A grid of one program a tensor."""
    tensor = tl.program_id(0)
    at = tl.load(firsts + tensor)
    end = tl.load(firsts + tensor + 1)
    lanes = tl.arange(0, BLOCK)
    if P == float("inf"):
        acc = tl.zeros((BLOCK,), tl.int64)
    else:
        acc = tl.zeros((BLOCK,), tl.float64)
    for i in range(at, end, BLOCK):
        acc = _joined(acc, tl.load(partials + i + lanes, mask=i + lanes < end, other=0.0), float("inf") if P == float("inf") else 1)
    if P == float("inf"):
        out = tl.max(acc, 0).to(tl.float64, bitcast=True)
    else:
        out = tl.sum(acc, 0)
    tl.store(sums + tensor, out)


@triton.jit
def _changed(x, value, CLAMP: tl.constexpr):
    """`x` times `value`, or clamped to it, in the type of `value`. A clamp leaves NaN as it is."""
    wide = _wide(x)
    if CLAMP:
        out = tl.where(wide > value, value, tl.where(wide < -value, -value, wide))
    else:
        out = wide * value
    return _narrow(out, x.dtype)


@triton.jit
def _change(here, count, value, CLAMP: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):
        spot = here + at + lanes
        tl.store(spot, _changed(tl.load(spot), value, CLAMP))
    if whole < count:
        spot = here + whole + lanes
        inside = whole + lanes < count
        tl.store(spot, _changed(tl.load(spot, mask=inside, other=0), value, CLAMP), mask=inside)


@triton.jit
def _typed_change(address, start, count, value, TYPE: tl.constexpr, WIDE: tl.constexpr, CLAMP: tl.constexpr, BLOCK: tl.constexpr):
    value = value.to(WIDE)
    if CLAMP:
        act = value < float("inf")
    else:
        act = value != 1.0
    if act:
        if address % 16 == 0:
            _change(_aligned(address, TYPE) + start, count, value, CLAMP, BLOCK)
        else:
            _change(address.to(tl.pointer_type(TYPE)) + start, count, value, CLAMP, BLOCK)


@triton.jit(do_not_specialize_on_alignment=["values"])
def change(
    pointers, owners, firsts, counts, codes, values,
    STRIDE: tl.constexpr, TYPES: tl.constexpr, CLAMP: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiplies or clamps in place; a program reads and writes nothing where the factor is 1 or the bound inf (or NaN).

    values: float64, one every STRIDE; with 0 one for all. Tables, TYPES and the grid as for `chunk_sums`.
    """
    chunk = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + chunk)
    value = tl.load(values + owner * STRIDE)
    address = tl.load(pointers + owner)
    start = (chunk - tl.load(firsts + owner)) * CHUNK
    count = tl.minimum(tl.load(counts + owner) - start, CHUNK).to(tl.int32)
    code = tl.load(codes + owner)
    if address != 0:
        if TYPES & 1:
            if code == 0:
                _typed_change(address, start, count, value, tl.float32, tl.float32, CLAMP, BLOCK)
        if TYPES & 2:
            if code == 1:
                _typed_change(address, start, count, value, tl.float64, tl.float64, CLAMP, BLOCK)
        if TYPES & 4:
            if code == 2:
                _typed_change(address, start, count, value, tl.uint16, tl.float32, CLAMP, BLOCK)
        if TYPES & 8:
            if code == 3:
                _typed_change(address, start, count, value, tl.float16, tl.float32, CLAMP, BLOCK)


@triton.jit
def _clamp_sums(here, count, value, partials, stride, P: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    if P == float("inf"):
        size = tl.zeros((BLOCK,), tl.int64)
    else:
        size = tl.zeros((BLOCK,), tl.float64)
    bounded = size
    square = tl.zeros((BLOCK,), tl.float64)
    after = square
    product = square
    beyond = square
    for at in range(0, count, BLOCK):
        x = _wide(tl.load(here + at + lanes, mask=at + lanes < count, other=0)).to(tl.float64)
        c = tl.where(x > value, value, tl.where(x < -value, -value, x))
        size = _joined(size, x, P)
        bounded = _joined(bounded, c, P)
        square += x * x
        after += c * c
        product += x * c
        beyond += tl.where(tl.abs(x) > value, 1.0, 0.0)
    if P == float("inf"):
        tl.store(partials, tl.max(size, 0).to(tl.float64, bitcast=True))
        tl.store(partials + stride, tl.max(bounded, 0).to(tl.float64, bitcast=True))
    else:
        tl.store(partials, tl.sum(size, 0))
        tl.store(partials + stride, tl.sum(bounded, 0))
    tl.store(partials + 2 * stride, tl.sum(square, 0))
    tl.store(partials + 3 * stride, tl.sum(after, 0))
    tl.store(partials + 4 * stride, tl.sum(product, 0))
    tl.store(partials + 5 * stride, tl.sum(beyond, 0))


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=["values", "partials"])
def chunk_clamps(
    pointers, owners, firsts, counts, codes, values, partials, chunks,
    STRIDE: tl.constexpr, TYPES: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partials [6, chunks] float64, 0 before: of x and of c, which is x clamped to its tensor's value.

    Sums of |x|^P and |c|^P (maxima for P = inf), of x², c² and x·c, and how many x are beyond the value. values: float64, one
    every STRIDE, used in float32 except for float64 tensors. Tables, TYPES and the grid as for `chunk_sums`.
    """
    chunk = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + chunk)
    value = tl.load(values + owner * STRIDE)
    low = value.to(tl.float32).to(tl.float64)
    address = tl.load(pointers + owner)
    start = (chunk - tl.load(firsts + owner)) * CHUNK
    count = tl.minimum(tl.load(counts + owner) - start, CHUNK).to(tl.int32)
    code = tl.load(codes + owner)
    part = partials + chunk
    if address != 0:
        if TYPES & 1:
            if code == 0:
                _clamp_sums(address.to(tl.pointer_type(tl.float32)) + start, count, low, part, chunks, P, BLOCK)
        if TYPES & 2:
            if code == 1:
                _clamp_sums(address.to(tl.pointer_type(tl.float64)) + start, count, value, part, chunks, P, BLOCK)
        if TYPES & 4:
            if code == 2:
                _clamp_sums(address.to(tl.pointer_type(tl.uint16)) + start, count, low, part, chunks, P, BLOCK)
        if TYPES & 8:
            if code == 3:
                _clamp_sums(address.to(tl.pointer_type(tl.float16)) + start, count, low, part, chunks, P, BLOCK)
