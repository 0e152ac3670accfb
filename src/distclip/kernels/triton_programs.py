"""The device programs of `triton_lists`, in Triton's language. Imported only where triton is used.

One program works on one chunk of one tensor. A tensor's address and dtype are read from tables, so
that one launch serves a list of tensors of mixed dtypes. Loads and stores are 16 bytes wide from a
tensor's first multiple of 16 bytes on; what lies before it, seven elements at most, is handled
separately. Offsets within a tensor are 64 bits wide.
"""

# Branches on constants are compiled away, so the two sides of one may differ in type: no
# conditional expressions, and no `and` that mixes what the compiler knows with what the device
# reads.
# ruff: noqa: SIM102, SIM108, SIM300
# pyright: basic, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

# elements that one program reads: few enough programs for large lists, and a tensor of this size
# still has its own
CHUNK = 32768
BLOCK = 2048  # elements that are summed side by side in float64: 16 a thread
PART = 1024  # the same in float32, which takes more registers
WARPS = 4
# how elements are changed where tensors are small, and elsewhere: so many at a time, by so many
# warps, so many programs a processor
SMALL, LARGE = (4096, WARPS, 16), (16384, 16, 2)
LANES = 512  # partial sums in flight

_FLIGHT = tl.constexpr(4096)  # elements that are on their way at a time
# a thread's neighbours are four elements or more: they are added without leaving it
_LEVELS = tl.constexpr(2)
_AHEAD = tl.constexpr(128)  # chunks whose values are looked at together
_EDGE = tl.constexpr(1024)  # elements at a time where a tensor begins or ends
# 16-bit numbers are turned into float64 without a conversion, by moving the bits of a float32: only
# 0, inf, NaN and what is below 2^-126 come out wrong, namely as 2^-127 or as 2^128 and more, which
# a sum of squares shows
_OF_ZERO = tl.constexpr(2.0**-254)
# below, the zeros could matter; from there on there may be an inf among them
_MOVED = tl.constexpr((2.0**-190, 2.0**256))
# where squares and their errors neither left float32 nor were rounded to 0
_COMPENSATED = tl.constexpr((2.0**-80, 2.0**120))


@triton.jit
def _widen_value(x):
    """float32, or float64 for float64. bfloat16 is read as its bits, uint16: devices before sm_80
    and the interpreter do not round it."""
    if x.dtype == tl.uint16:
        x = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float16:
        x = x.to(tl.float32)
    return x


@triton.jit
def _round_to_type(x, TYPE: tl.constexpr):
    """`_widen_value` undone, rounded to nearest even."""
    if TYPE == tl.uint16:
        bits = x.to(tl.uint32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # adding could turn a NaN into inf or 0
        out = tl.where(x == x, even, (bits >> 16) | 0x40).to(tl.uint16)
    else:
        out = x.to(TYPE)
    return out


@triton.jit
def _raise_to_p(size, P: tl.constexpr):
    """float64 `size` to the P: whole P by multiplication, others right to 1e-13."""
    if P == 1:
        out = size
    elif P == 3:
        out = size * size * size
    elif P == 4:
        out = size * size
        out = out * out
    else:
        out = tl.exp2(tl.log2(size) * tl.full((), P, tl.float64))
    return out


@triton.jit
def _accumulate_power(acc, x, P: tl.constexpr):
    """`acc` with |x|^P added, or for P = inf the larger bits: as bits NaN is above inf, so that it
    stays."""
    if P == float("inf"):
        if x.dtype == tl.float64:
            acc = tl.maximum(acc, x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF)
        else:
            acc = tl.maximum(acc, _widen_value(x).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    elif P == 2:
        size = _widen_value(x).to(tl.float64)
        acc = tl.fma(size, size, acc)
    else:
        acc += _raise_to_p(tl.abs(_widen_value(x).to(tl.float64)), P)
    return acc


@triton.jit
def _moved_bits(x):
    """float64 |x| of 16-bit numbers, but for those that `_MOVED` speaks of. Conversions run at a
    quarter of float64's own rate."""
    bits = _widen_value(x).to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    return (((bits >> 3) + 0x38000000).to(tl.uint64) << 32).to(tl.float64, bitcast=True)


@triton.jit
def _moved_sum(here, count, BLOCK: tl.constexpr):
    """[] float64, and whether it is right: the sum of squares of 16-bit numbers, each squared in
    float64."""
    lanes = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, count, _FLIGHT):
        for k in tl.static_range(_FLIGHT // BLOCK):
            size = _moved_bits(tl.load(here + at + k * BLOCK + lanes))
            acc = tl.fma(size, size, acc)
    out = tl.sum(acc, 0)
    if out == count.to(tl.float64) * _OF_ZERO:
        out = tl.full((), 0, tl.float64)
    return out, (out == 0) | ((out >= _MOVED[0]) & (out < _MOVED[1]))


@triton.jit
def _two_sum(a, b):
    """a + b in float32, and its rounding error."""
    out = a + b
    had = out - a
    return out, (a - (out - had)) + (b - had)


@triton.jit
def _compensated_sum(here, count, PART: tl.constexpr):
    """[] float64, and whether it is right: the sum of squares in float32 with its rounding
    errors summed beside it, right to 1e-12."""
    lanes = tl.arange(0, PART)
    acc = tl.zeros((PART,), tl.float32)
    lost = tl.zeros((PART,), tl.float32)
    seen = tl.zeros((PART,), tl.int32)
    for at in range(0, count, _FLIGHT):
        for k in tl.static_range(_FLIGHT // PART):
            x = tl.load(here + at + k * PART + lanes)
            size = _widen_value(x)
            square = size * size
            acc, less = _two_sum(acc, square)
            if x.dtype == tl.float32:  # squares of the others are exact
                less += tl.fma(size, size, -square)
            lost += less
            seen |= size.to(tl.int32, bitcast=True)
    empty = tl.max(seen & 0x7FFFFFFF, 0) == 0
    for _ in tl.static_range(_LEVELS):
        acc, other = tl.split(tl.reshape(acc, (acc.shape[0] // 2, 2)))
        lost, more = tl.split(tl.reshape(lost, (lost.shape[0] // 2, 2)))
        acc, less = _two_sum(acc, other)
        lost += more + less
    out = tl.sum(acc.to(tl.float64) + lost.to(tl.float64), 0)
    return out, empty | ((out >= _COMPENSATED[0]) & (out <= _COMPENSATED[1]))


@triton.jit
def _sum_of(
    here,
    head,
    body,
    count,
    P: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """[] float64: the power sum of `head` elements at `here` and of `count` at `body`."""
    quick = tl.full((), 0, tl.float64)
    start = count * 0
    if P == 2:
        if here.dtype.element_ty != tl.float64:
            if not (DOUBLE and here.dtype.element_ty == tl.float32):
                whole = count // _FLIGHT * _FLIGHT
                if whole > 0:
                    if DOUBLE:
                        found, right = _moved_sum(body, whole, BLOCK)
                    else:
                        found, right = _compensated_sum(body, whole, PART)
                    if right:  # else all is recomputed, element by element in float64
                        quick = found
                        start = whole
    lanes = tl.arange(0, BLOCK)
    if P == float("inf"):
        if here.dtype.element_ty == tl.float64:
            acc = tl.zeros((BLOCK,), tl.int64)
        else:
            acc = tl.zeros((BLOCK,), tl.int32)
    else:
        acc = tl.zeros((BLOCK,), tl.float64)
    if head > 0:
        acc = _accumulate_power(acc, tl.load(here + lanes, mask=lanes < head, other=0), P)
    whole = start + (count - start) // BLOCK * BLOCK
    # without a mask, which would keep loads from being vectorised
    for at in range(start, whole, BLOCK):
        acc = _accumulate_power(acc, tl.load(body + at + lanes), P)
    if whole < count:
        acc = _accumulate_power(
            acc, tl.load(body + whole + lanes, mask=whole + lanes < count, other=0), P
        )
    if P == float("inf"):
        if here.dtype.element_ty == tl.float64:
            out = tl.max(acc, 0).to(tl.float64, bitcast=True)
        else:
            out = tl.max(acc, 0).to(tl.float32, bitcast=True).to(tl.float64)
    else:
        out = quick + tl.sum(acc, 0)
    return out


@triton.jit
def _head_count(address, count, TYPE: tl.constexpr):
    """How many of `count` elements lie before the first multiple of 16 bytes."""
    return tl.minimum((-address & 15) // (TYPE.primitive_bitwidth // 8), count).to(tl.int32)


@triton.jit
def _aligned_pointer(address, TYPE: tl.constexpr):
    """A pointer to a multiple of 16 bytes, which the compiler learns of. The hint sticks to the
    value that it is given: this one is new."""
    return tl.multiple_of((address & -16).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _typed_sum(
    address,
    start,
    count,
    TYPE: tl.constexpr,
    P: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    head = _head_count(address, count, TYPE)
    # a chunk's start is a multiple of 16 bytes from the first one's
    body = _aligned_pointer(address + 15, TYPE) + start
    return _sum_of(
        address.to(tl.pointer_type(TYPE)) + start, head, body, count - head, P, DOUBLE, BLOCK, PART
    )


@triton.jit
def chunk_sums(
    pointers, owners, firsts, counts, codes, partials,
    TYPES: tl.constexpr, P: tl.constexpr, DOUBLE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """partials [chunks] float64: each chunk's sum of |x|^P, or its maximum for P = inf. A grid of
    one program a chunk.

    All of `triton_lists.KernelPlan`: pointers [n] int64 (0: no tensor, its chunks give 0), owners
    [chunks] int32, firsts [n + 1] int64, counts [n] int64, codes [n] int32. TYPES: bit k is set
    where dtype code k occurs; only those are compiled. DOUBLE: whether the device computes in
    float64 at half of float32's rate. Compiled without contraction of multiply and add, which would
    lose the errors.
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
                out = _typed_sum(address, start, count, tl.float32, P, DOUBLE, BLOCK, PART)
        if TYPES & 2:
            if code == 1:
                out = _typed_sum(address, start, count, tl.float64, P, DOUBLE, BLOCK, PART)
        if TYPES & 4:
            if code == 2:
                out = _typed_sum(address, start, count, tl.uint16, P, DOUBLE, BLOCK, PART)
        if TYPES & 8:
            if code == 3:
                out = _typed_sum(address, start, count, tl.float16, P, DOUBLE, BLOCK, PART)
    tl.store(partials + chunk, out)


@triton.jit
def _row_of_sums(partials, at, end, P: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    if P == float("inf"):
        acc = tl.zeros((BLOCK,), tl.int64)
    else:
        acc = tl.zeros((BLOCK,), tl.float64)
    for i in range(at, end, BLOCK):
        acc = _accumulate_power(
            acc, tl.load(partials + i + lanes, mask=i + lanes < end, other=0.0), P
        )
    if P == float("inf"):
        out = tl.max(acc, 0).to(tl.float64, bitcast=True)
    else:
        out = tl.sum(acc, 0)
    return out


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=["partials"])
def tensor_sums(partials, firsts, sums, chunks, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """sums [n, rows] float64 from partials [rows, chunks], always in the same order; the first MOST
    rows are maxima.

    A grid of one program a tensor and row.
    """
    tensor = tl.program_id(0)
    row = tl.program_id(1)
    at = tl.load(firsts + tensor)
    end = tl.load(firsts + tensor + 1)
    here = partials + row.to(tl.int64) * chunks
    if row < MOST:
        out = _row_of_sums(here, at, end, float("inf"), BLOCK)
    else:
        out = _row_of_sums(here, at, end, 1, BLOCK)
    tl.store(sums + tensor.to(tl.int64) * tl.num_programs(1) + row, out)


@triton.jit
def _changed_value(x, value, CLAMP: tl.constexpr):
    """`x` times `value`, or clamped to it, in the type of `value`. A clamp leaves NaN as it is."""
    wide = _widen_value(x)
    if CLAMP:
        out = tl.where(wide > value, value, tl.where(wide < -value, -value, wide))
    else:
        out = wide * value
    return _round_to_type(out, x.dtype)


@triton.jit
def _change_edge(here, count, value, CLAMP: tl.constexpr):
    lanes = tl.arange(0, _EDGE)
    for at in range(0, count, _EDGE):
        spot = here + at + lanes
        inside = at + lanes < count
        tl.store(
            spot, _changed_value(tl.load(spot, mask=inside, other=0), value, CLAMP), mask=inside
        )


@triton.jit
def _typed_change(
    address,
    start,
    count,
    value,
    TYPE: tl.constexpr,
    WIDE: tl.constexpr,
    CLAMP: tl.constexpr,
    WRITTEN: tl.constexpr,
):
    value = value.to(WIDE)
    if _has_effect(value, CLAMP):
        head = _head_count(address, count, TYPE)
        if head > 0:
            _change_edge(address.to(tl.pointer_type(TYPE)) + start, head, value, CLAMP)
        body = _aligned_pointer(address + 15, TYPE) + start
        lanes = tl.arange(0, WRITTEN)
        whole = (count - head) // WRITTEN * WRITTEN
        for at in range(0, whole, WRITTEN):
            spot = body + at + lanes
            tl.store(spot, _changed_value(tl.load(spot), value, CLAMP))
        _change_edge(body + whole, count - head - whole, value, CLAMP)


@triton.jit
def _has_effect(value, CLAMP: tl.constexpr):
    if CLAMP:
        out = value < float("inf")
    else:
        out = value != 1.0
    return out


@triton.jit
def _change_chunk(
    pointers, owners, firsts, counts, codes, values, chunk,
    STRIDE: tl.constexpr, TYPES: tl.constexpr, CLAMP: tl.constexpr,
    CHUNK: tl.constexpr, WRITTEN: tl.constexpr,
):  # fmt: skip
    owner = tl.load(owners + chunk)
    value = tl.load(values + owner * STRIDE)
    address = tl.load(pointers + owner)
    start = (chunk - tl.load(firsts + owner)) * CHUNK
    count = tl.minimum(tl.load(counts + owner) - start, CHUNK).to(tl.int32)
    code = tl.load(codes + owner)
    if address != 0:
        if TYPES & 1:
            if code == 0:
                _typed_change(address, start, count, value, tl.float32, tl.float32, CLAMP, WRITTEN)
        if TYPES & 2:
            if code == 1:
                _typed_change(address, start, count, value, tl.float64, tl.float64, CLAMP, WRITTEN)
        if TYPES & 4:
            if code == 2:
                _typed_change(address, start, count, value, tl.uint16, tl.float32, CLAMP, WRITTEN)
        if TYPES & 8:
            if code == 3:
                _typed_change(address, start, count, value, tl.float16, tl.float32, CLAMP, WRITTEN)


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=["values"])
def change_chunks(
    pointers, owners, firsts, counts, codes, values, chunks,
    STRIDE: tl.constexpr, TYPES: tl.constexpr, CLAMP: tl.constexpr,
    CHUNK: tl.constexpr, WRITTEN: tl.constexpr,
):  # fmt: skip
    """Multiplies or clamps in place; nothing is read or written where the factor is 1 or the bound
    inf (or NaN).

    values: float64, one every STRIDE; with 0 one for all. Tables and TYPES as for `chunk_sums`. A
    grid of any size: the programs take the chunks in turns, and each looks at the values of many of
    its own at a time, so that little is left to do where none acts.
    """
    programs = tl.num_programs(0)
    for begin in range(tl.program_id(0), chunks, programs * _AHEAD):
        mine = begin + tl.arange(0, _AHEAD) * programs
        owner = tl.load(owners + mine, mask=mine < chunks, other=-1)
        value = tl.load(values + owner * STRIDE, mask=owner >= 0, other=1.0)
        if tl.max((_has_effect(value, CLAMP) & (owner >= 0)).to(tl.int32), 0) != 0:
            for chunk in range(begin, tl.minimum(begin + programs * _AHEAD, chunks), programs):
                _change_chunk(
                    pointers,
                    owners,
                    firsts,
                    counts,
                    codes,
                    values,
                    chunk,
                    STRIDE,
                    TYPES,
                    CLAMP,
                    CHUNK,
                    WRITTEN,
                )


@triton.jit
def _accumulate_clamp(size, bounded, square, after, product, beyond, x, value, P: tl.constexpr):
    x = _widen_value(x)
    bound = value.to(x.dtype)  # which it is already, but for its type
    above = x > bound
    below = x < -bound
    x = x.to(tl.float64)
    c = tl.where(above, value, tl.where(below, -value, x))
    if P != 2:
        size = _accumulate_power(size, x, P)
        bounded = _accumulate_power(bounded, c, P)
    square = tl.fma(x, x, square)
    after = tl.fma(c, c, after)
    product = tl.fma(x, c, product)
    return size, bounded, square, after, product, beyond + (above | below).to(tl.int32)


@triton.jit
def _clamp_sums(
    address,
    start,
    count,
    value,
    partials,
    stride,
    TYPE: tl.constexpr,
    P: tl.constexpr,
    PART: tl.constexpr,
):
    lanes = tl.arange(0, PART)
    if P == float("inf"):
        size = tl.zeros((PART,), tl.int64)
    else:
        size = tl.zeros((PART,), tl.float64)
    bounded = size
    square = tl.zeros((PART,), tl.float64)
    after = square
    product = square
    beyond = tl.zeros((PART,), tl.int32)
    head = _head_count(address, count, TYPE)
    if head > 0:
        x = tl.load(address.to(tl.pointer_type(TYPE)) + start + lanes, mask=lanes < head, other=0)
        size, bounded, square, after, product, beyond = _accumulate_clamp(
            size, bounded, square, after, product, beyond, x, value, P
        )
    body = _aligned_pointer(address + 15, TYPE) + start
    whole = (count - head) // PART * PART
    for at in range(0, whole, PART):
        x = tl.load(body + at + lanes)
        size, bounded, square, after, product, beyond = _accumulate_clamp(
            size, bounded, square, after, product, beyond, x, value, P
        )
    if whole < count - head:
        x = tl.load(body + whole + lanes, mask=whole + lanes < count - head, other=0)
        size, bounded, square, after, product, beyond = _accumulate_clamp(
            size, bounded, square, after, product, beyond, x, value, P
        )
    if P == 2:
        size = square
        bounded = after
    if P == float("inf"):
        tl.store(partials, tl.max(size, 0).to(tl.float64, bitcast=True))
        tl.store(partials + stride, tl.max(bounded, 0).to(tl.float64, bitcast=True))
    else:
        tl.store(partials, tl.sum(size, 0))
        tl.store(partials + stride, tl.sum(bounded, 0))
    tl.store(partials + 2 * stride, tl.sum(square, 0))
    tl.store(partials + 3 * stride, tl.sum(after, 0))
    tl.store(partials + 4 * stride, tl.sum(product, 0))
    tl.store(partials + 5 * stride, tl.sum(beyond, 0).to(tl.float64))


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=["values", "partials"])
def chunk_clamps(
    pointers, owners, firsts, counts, codes, values, partials, chunks,
    STRIDE: tl.constexpr, TYPES: tl.constexpr, P: tl.constexpr,
    CHUNK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """partials [6, chunks] float64, 0 before: of x and of c, which is x clamped to its tensor's
    value.

    Sums of |x|^P and |c|^P (maxima for P = inf), of x², c² and x·c, and how many x are beyond the
    value. values: float64, one every STRIDE, used in float32 except for float64 tensors. Tables,
    TYPES and the grid as for `chunk_sums`.
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
                _clamp_sums(address, start, count, low, part, chunks, tl.float32, P, PART)
        if TYPES & 2:
            if code == 1:
                _clamp_sums(address, start, count, value, part, chunks, tl.float64, P, PART)
        if TYPES & 4:
            if code == 2:
                _clamp_sums(address, start, count, low, part, chunks, tl.uint16, P, PART)
        if TYPES & 8:
            if code == 3:
                _clamp_sums(address, start, count, low, part, chunks, tl.float16, P, PART)
