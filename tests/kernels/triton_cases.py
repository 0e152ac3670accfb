"""What `test_triton` runs in processes of its own: under triton's interpreter, or compiling for a
device that is not there."""

import ctypes
import math
import mmap
import os
import re
import subprocess
import tempfile
from array import array
from pathlib import Path

import numpy as np
import torch

from distclip.errors import ConfigError
from distclip.kernels import reference, triton_lists
from distclip.kernels.triton_lists import KernelPlan

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# of triton_programs, compared with it in `sizes`
CHUNK, BLOCK, FLIGHT, SMALL, LARGE = 32768, 2048, 4096, (4096, 4, 16), (16384, 16, 2)
COUNTS = (0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 1, FLIGHT, FLIGHT + 1, CHUNK, CHUNK + 1)


def start():
    if os.environ["TRITON_INTERPRET"] == "1":
        _scalars_are_numbers()
        _products_are_exact()


def _scalars_are_numbers():
    """The interpreter of triton 3.6 calls int() on arrays of one element, which numpy 2.5 refuses:
    mended here."""
    from triton.runtime import interpreter

    given = interpreter._patch_lang_tensor

    def mended(tensor, *rest):
        given(tensor, *rest)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = mended


def _products_are_exact():
    """The interpreter rounds a product before it adds to it; a device does not, and the error of a
    float32 square is got by that."""
    from triton.runtime import interpreter

    def fma(self, x, y, z):
        wide = np.float64 if z.data.dtype == np.float32 else z.data.dtype
        out = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
        return interpreter.TensorHandle(out.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fma


def without_double(function, *args):
    """What `function` answers on a device that is slow in float64."""
    given = triton_lists.has_fast_float64
    triton_lists.plan_for.cache_clear()
    triton_lists.has_fast_float64 = lambda device: False
    try:
        return function(*args)
    finally:
        triton_lists.has_fast_float64 = given
        triton_lists.plan_for.cache_clear()


def sizes():
    from distclip.kernels import triton_programs

    programs = triton_programs
    return programs.CHUNK, programs.BLOCK, programs._FLIGHT.value, programs.SMALL, programs.LARGE


def listed(tensors):
    """The kernels for these tensors, and their addresses."""
    layout = triton_lists.plan_for(
        tuple(t.numel() for t in tensors), tuple(t.dtype for t in tensors), torch.device("cpu")
    )
    return layout, array("Q", [t.data_ptr() for t in tensors])


def numbers(count, dtype, seed=0):
    return torch.randn(
        count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def measured(tensors, p):
    with np.errstate(all="ignore"):  # log2(0) is -inf, as it is meant
        layout, pointers = listed(tensors)
        return layout.power_sums(pointers, p).tolist()


def oracle(tensor, p):
    """Exactly rounded, by Python alone."""
    values = [abs(x) for x in tensor.double().flatten().tolist()]
    if any(map(math.isnan, values)):
        return math.nan
    return max(values, default=0.0) if p == math.inf else math.fsum(x**p for x in values)


def worst(tensors, p):
    """The largest relative error, and how many sums are not 0."""
    pairs = list(zip(measured(tensors, p), (oracle(t, p) for t in tensors), strict=True))
    return max(abs(got - want) / max(want, 5e-324) for got, want in pairs), sum(
        got != 0 for got, _ in pairs
    )


def of_all_sizes(dtype, p):
    return worst([numbers(count, dtype, count) for count in COUNTS], p)


def unaligned(dtype, p):
    whole = numbers(CHUNK + FLIGHT + 9, dtype)
    views = [whole[1:], whole[3 : BLOCK + 3], whole[5:6]]
    assert all(view.data_ptr() % 16 for view in views) or dtype == torch.float64
    return worst(views, p)


def of_any_size(dtype):
    """Sums of squares where a quick way of forming them leaves its range: the largest error,
    whether zeros give 0, and how many do not."""
    draw = torch.Generator().manual_seed(0)
    small, large = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    zeros = torch.zeros(2 * FLIGHT + 5, dtype=torch.float64)
    spread = (
        torch.randn(3 * FLIGHT, generator=draw, dtype=torch.float64).exp2()
        * torch.rand(3 * FLIGHT, generator=draw) ** 20
    )
    tensors = [zeros.to(dtype), (-zeros).to(dtype)]
    for value in (
        small,
        3 * small,
        small**0.5,
        small**0.75,
        0.1,
        1.0,
        1e4,
        large**0.5,
        large / 3,
        large,
    ):
        alone, rare = zeros.clone(), zeros.clone()
        alone[FLIGHT + 3], rare[::97] = value, value
        tensors += [t.to(dtype) for t in (alone, rare, zeros + value)]
    tensors += [
        torch.full((FLIGHT,), torch.finfo(dtype).smallest_normal).to(dtype) / 4,
        spread.to(dtype),
        (spread * small).to(dtype),
    ]
    found = measured(tensors, 2.0)
    return worst(tensors, 2.0)[0], found[:2], sum(x > 0 for x in found[2:]) / len(found[2:])


def mixed_extremes():
    """Mixed dtypes, where squares leave float32: errors, the first being that of the largest and
    smallest."""
    low, half = torch.bfloat16, torch.float16
    tensors = [
        torch.full((5,), 1e20),
        torch.full((5,), 1e-25),
        torch.full((2,), 1e-45),
        torch.tensor([1e20, 1e-25, 3.0]),
        torch.tensor([1e150, -2e150], dtype=torch.float64),
        torch.full((3,), 1e30, dtype=low),
        torch.full((3,), -1e-38, dtype=low),
        torch.tensor([6e-8, 65504.0], dtype=half),
        numbers(300, torch.float32),
        numbers(60, half).view(5, 12).t(),
        numbers(48, low).view(1, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    ]
    return worst(tensors, 2.0), worst(tensors, 1.0), worst(tensors, math.inf)


def nonfinite(dtype, p):
    """Sums of tensors with one inf or NaN at the start, at the end, and of a clean one between
    them."""
    out = []
    for bad in (math.inf, -math.inf, math.nan):
        first, clean, last, both = (numbers(count, dtype) for count in (BLOCK + 5, 3, CHUNK + 3, 4))
        first[0], last[-1], both[0], both[3] = bad, bad, math.nan, bad
        out.append((bad, measured([first, clean, last, both], p), oracle(clean, p)))
    return out


def absent():
    """Sums and values where tensors are missing."""
    tensors = [
        numbers(5, torch.float32),
        numbers(CHUNK + 1, torch.bfloat16),
        numbers(4, torch.float64),
    ]
    layout = KernelPlan(
        [t.numel() for t in tensors], [t.dtype for t in tensors], torch.device("cpu")
    )
    sums = layout.power_sums([tensors[0].data_ptr(), 0, tensors[2].data_ptr()], 2.0).tolist()
    before = [t.clone() for t in tensors]
    layout.scale_([0, tensors[1].data_ptr(), 0], torch.tensor(0.5, dtype=torch.float64))
    again = layout.power_sums([0, 0, 0], 2.0).tolist()
    kept = [torch.equal(a, b) for a, b in zip(before, tensors, strict=True)]
    return sums, [oracle(before[0], 2.0), 0.0, oracle(before[2], 2.0)], kept, again


def multiplied(dtype, factor):
    """How many elements differ in any bit from torch's, of how many that were changed; NaNs count
    as one another."""
    if dtype in (torch.bfloat16, torch.float16):  # every number there is
        tensors = [torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)]
    else:
        special = torch.tensor(
            [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 1e-38, 3.4e38, 1.0], dtype=dtype
        )
        tensors = [
            special,
            numbers(BLOCK + 1, dtype),
            numbers(CHUNK + 3, dtype)[1:],
            numbers(3, dtype)[1:2],
        ]
    want = [t.clone() for t in tensors]
    torch._foreach_mul_(
        want, torch.tensor(factor, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    )
    before = [t.clone() for t in tensors]
    with np.errstate(all="ignore"):
        layout, pointers = listed(tensors)
        layout.scale_(pointers, factor)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    off = [
        ((a.view(bits) != b.view(bits)) & ~(a.isnan() & b.isnan())).sum()
        for a, b in zip(tensors, want, strict=True)
    ]
    moved = [((a != b) & ~a.isnan()).sum() for a, b in zip(tensors, before, strict=True)]
    return int(sum(off)), int(sum(moved))


def each_by_its_own(count):
    tensors = [
        numbers(3, torch.float32),
        numbers(count, torch.float32)[1:],
        numbers(2, torch.float64),
        numbers(9, torch.bfloat16),
    ]
    factors = torch.tensor([0.5, 1.0, 3.0, 0.25], dtype=torch.float64)
    want = [(t.double() * f).to(t.dtype) for t, f in zip(tensors, factors, strict=True)]
    layout, pointers = listed(tensors)
    layout.scale_(pointers, factors)
    return [torch.equal(a, b) for a, b in zip(tensors, want, strict=True)]


def many_by_their_own():
    """More tensors than programs look at together, most of which are left alone: which are not what
    they should be."""
    from distclip.kernels import triton_programs as programs

    count, programs.SMALL = 2 * programs._AHEAD.value + 30, (*SMALL[:2], 2)
    tensors = [torch.full((3,), float(i)) for i in range(count)]
    factors = torch.ones(count, dtype=torch.float64)
    factors[:200:7], factors[-1] = 0.5, 0.25
    layout, pointers = listed(tensors)
    programs.SMALL = SMALL
    layout.scale_(pointers, factors)
    return [
        i
        for i, (t, f) in enumerate(zip(tensors, factors.tolist(), strict=True))
        if t.tolist() != [i * f] * 3
    ]


def one_for_all():
    """A number, a 0-dim tensor, an expanded one (whose memory holds one number alone), every second
    of a tensor."""
    half = torch.tensor(0.5, dtype=torch.float64)
    many = torch.tensor([0.5, 7.0, 0.5, 7.0, 0.5, 7.0], dtype=torch.float64)
    out = []
    for factors in (0.5, half, half.expand(3), many[::2]):
        tensors = [
            numbers(3, torch.float32),
            numbers(CHUNK + 1, torch.bfloat16),
            numbers(2, torch.float64),
        ]
        want = [t * 0.5 for t in tensors]
        layout, pointers = listed(tensors)
        layout.scale_(pointers, factors)
        out += [torch.equal(a, b) for a, b in zip(tensors, want, strict=True)]
    return out


def clamped(dtype, value):
    tensors = [
        numbers(BLOCK + 3, dtype),
        torch.tensor([math.nan, math.inf, -math.inf, 0.0, -9.0], dtype=dtype),
    ]
    limit = torch.tensor(value, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    want = [
        torch.minimum(torch.maximum(t.to(limit.dtype), -limit), limit).to(dtype) for t in tensors
    ]
    layout, pointers = listed(tensors)
    layout.clamp_(pointers, torch.full((2,), value, dtype=torch.float64))
    return [
        torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))
        for a, b in zip(tensors, want, strict=True)
    ]


def would_clamp(p):
    """Six columns of mixed tensors, and torch's; one tensor has NaN, one is not there."""
    tensors = [
        numbers(CHUNK + 9, torch.float32),
        numbers(0, torch.float32),
        numbers(77, torch.float64),
        numbers(BLOCK + 1, torch.bfloat16),
    ]
    tensors += [
        numbers(5, torch.float16),
        torch.tensor([math.nan, 2.0]),
        torch.tensor([math.inf, 2.0]),
        torch.ones(3),
    ]
    values = torch.tensor([0.7, 1.0, 1 / 3, 0.1, math.inf, 1.0, 1.0, 1.0], dtype=torch.float64)
    layout, pointers = listed(tensors)
    pointers[-1] = 0
    with np.errstate(all="ignore"):
        found = layout.clamped_sums(pointers, values, p)
    want = reference.clamped_sums(tensors, values, p)
    want[-1] = 0
    return found.tolist(), want.tolist()


def on_a_page_that_nobody_may_touch(act, value):
    """A page without any access meanwhile: one read or write ends the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    page = mmap.mmap(-1, mmap.PAGESIZE)
    tensor = torch.frombuffer(page, dtype=torch.float32)
    tensor.fill_(3.0)
    layout, pointers = listed([tensor])
    function, number = getattr(layout, act), torch.tensor(value, dtype=torch.float64)
    other = torch.ones(tensor.numel())
    function([other.data_ptr()], number)  # all else has been done once
    assert libc.mprotect(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    function(pointers, number)
    assert (
        libc.mprotect(
            ctypes.c_void_p(tensor.data_ptr()),
            ctypes.c_size_t(mmap.PAGESIZE),
            mmap.PROT_READ | mmap.PROT_WRITE,
        )
        == 0
    )
    return bool((tensor == 3).all())


def repeated():
    tensors = [numbers(CHUNK * 2 + 77, torch.float32), numbers(5000, torch.bfloat16)]
    moved = [t.clone() for t in tensors]
    return [
        [x.hex() for x in measured(given, p)]
        for p in (2.0, 2.5)
        for given in (tensors, moved, tensors)
    ]


def beyond_two_to_the_31():
    """The last chunk of a tensor of 2^31 + 10 elements, whose other pages are never touched."""
    from distclip.kernels import triton_programs as programs

    far = 1 << 31
    tensor = torch.empty(far + 10, dtype=torch.float16)
    tensor[-10:] = 2.0
    pointers, owners = torch.tensor([tensor.data_ptr()]), torch.zeros(1, dtype=torch.int32)
    tables = (
        pointers,
        owners,
        torch.tensor([-(far // CHUNK)]),
        torch.tensor([far + 10]),
        torch.tensor([3], dtype=torch.int32),
    )
    partials = torch.zeros(1, dtype=torch.float64)
    programs.chunk_sums[(1,)](
        *tables, partials, TYPES=8, P=2.0, DOUBLE=True, CHUNK=CHUNK, BLOCK=BLOCK, PART=programs.PART
    )
    half = torch.tensor(0.5, dtype=torch.float64)
    programs.change_chunks[(1,)](
        *tables, half, 1, STRIDE=0, TYPES=8, CLAMP=False, CHUNK=CHUNK, WRITTEN=SMALL[0]
    )
    return float(partials), tensor[-10:].tolist()


def in_a_capture():
    """The host's part of a capture, with memory of the CPU: which addresses are used, and what is
    refused."""
    layout = KernelPlan([4], [torch.float32], torch.device("cpu"))
    known, other = torch.ones(4), torch.full((4,), 2.0)
    eager = layout._device_addresses([known.data_ptr()])
    triton_lists.is_capturing = lambda device: True
    triton_lists._RESERVE._free = torch.zeros(1, dtype=torch.int64)
    same = layout._device_addresses([known.data_ptr()]) is eager
    own = layout._device_addresses([other.data_ptr()])
    kept = [entry[1] for entry in triton_lists._GRAPHS]
    texts = []
    for call in (
        lambda: layout._device_addresses([64]),
        lambda: KernelPlan([5], [torch.float32], torch.device("cpu")),
    ):
        try:
            call()
        except ConfigError as error:
            texts.append(str(error))
    return (
        same,
        own.tolist() == [other.data_ptr()],
        own.data_ptr() == kept[1].data_ptr(),
        len(kept),
        texts,
    )


# what each argument is; one name may be another thing in a program of another file
FLOATS = (
    "partials sums values power_sums part_sums drift_weights further presence found_inf last_hash "
    "inv_scale words thresholds clip_rate vector columns coefs num_clipped told"
)
KINDS = {
    **dict.fromkeys(FLOATS.split(), "*fp64"),
    **dict.fromkeys(("pointers", "firsts", "counts", "num_calls", "num_skips"), "*i64"),
    **dict.fromkeys(("owners", "codes", "order"), "*i32"),
    **dict.fromkeys(("in_total", "flags", "clipped", "skipped", "ring"), "*u8"),
    "for_optimizers": "*fp32",
    **dict.fromkeys(("chunks", "pieces", "further_count", "has_error", "has_notes"), "i32"),
    **dict.fromkeys(
        (
            "step",
            "call",
            "last",
            "mixes",
            "read_only",
            "late",
            "groups",
            "layers",
            "rank_norms",
            "ranks",
        ),
        "i32",
    ),
}
OWN_KINDS = {
    "pack_words": {"firsts": "*i32", "weights": "*fp64"},
    "record_step": {"weights": "*i64"},
}
UNALIGNED = ("values", "chunks")  # as the kernels are declared


def compiled(kernel, target, warps, constants):
    """What a kernel becomes for a device that need not be here: its PTX and its innermost loops, as
    texts, and what a thread takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from distclip.kernels import step_programs, triton_programs

    of_step = hasattr(step_programs, kernel)
    function = getattr(step_programs if of_step else triton_programs, kernel)
    kinds = KINDS | OWN_KINDS.get(kernel, {})
    signature = {name: kinds.get(name, "constexpr") for name in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if name in kinds and name not in UNALIGNED and not of_step
    }
    if kernel == "tensor_sums":
        del aligned[(0,)]
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return built.asm["ptx"], _innermost_loops(built.asm["ptx"]), _resources(built.asm["cubin"])


def _innermost_loops(ptx):
    """The texts between a label and a jump back to it, without those that contain another one."""
    lines = ptx.splitlines()
    labels = {
        line.split(":")[0].strip(): i
        for i, line in enumerate(lines)
        if re.match(r"\s*\$L\w+:", line)
    }
    jumps = [
        (labels[found[1]], i)
        for i, line in enumerate(lines)
        if (found := re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line))
    ]
    spans = [(start, end) for start, end in jumps if start < end]
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return ["\n".join(lines[start:end]) for start, end in inner]


def _resources(cubin):
    """Registers, and bytes of memory of its own, of each thread; Triton brings the program that
    tells."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [program, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
    return tuple(int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
