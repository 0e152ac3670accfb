"""The Triton kernels: what they compute, under triton's interpreter; what they become, compiled for
GPUs that are not here."""

import math
import re
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch

from distclip.kernels import triton_lists
from kernels import triton_cases as cases
from kernels.elsewhere import Elsewhere

pytestmark = pytest.mark.skipif(not triton_lists.has_triton(), reason="triton is not installed")
SHORT = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
EVERY = pytest.mark.parametrize("dtype", cases.DTYPES, ids=SHORT.get)


def test_the_cases_reach_the_edges_of_chunks_and_blocks(interpreted):
    assert interpreted.run(cases.sizes) == (
        cases.CHUNK,
        cases.BLOCK,
        cases.FLIGHT,
        cases.SMALL,
        cases.LARGE,
    )


@pytest.mark.parametrize("p", [2.0, math.inf, 1.0, 0.3])
@EVERY
def test_power_sums_of_all_sizes(interpreted, dtype, p):
    error, nonzero = interpreted.run(cases.of_all_sizes, dtype, p)
    assert error < 2e-14 and nonzero == len(cases.COUNTS) - 1


@EVERY
def test_squares_where_float64_is_slow(interpreted, dtype):
    error, nonzero = interpreted.run(cases.without_double, cases.of_all_sizes, dtype, 2.0)
    assert error < 1e-13 and nonzero == len(cases.COUNTS) - 1
    error, nonzero = interpreted.run(cases.without_double, cases.unaligned, dtype, 2.0)
    assert error < 1e-13 and nonzero == 3
    for bad, (first, clean, last, both), expected in interpreted.run(
        cases.without_double, cases.nonfinite, dtype, 2.0
    ):
        assert clean == pytest.approx(expected, rel=1e-13) and math.isnan(both)
        for found in (first, last):
            assert math.isnan(found) if math.isnan(bad) else found == math.inf


@pytest.mark.parametrize("double", [True, False], ids=["double", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=SHORT.get)
def test_squares_of_any_size(interpreted, dtype, double):
    """From the smallest to the largest number of a dtype, among zeros and alone."""
    asked = (
        (cases.of_any_size, dtype) if double else (cases.without_double, cases.of_any_size, dtype)
    )
    error, of_zeros, nonzero = interpreted.run(*asked)
    assert error < (1e-14 if double else 1e-12)
    assert of_zeros == [0.0, 0.0] and nonzero > 0.8


@pytest.mark.parametrize("p", [0.5, 2.5, 3.0, 4.0, 8.0])
def test_other_orders(interpreted, p):
    error, nonzero = interpreted.run(cases.of_all_sizes, torch.float32, p)
    assert error < 2e-14 and nonzero == len(cases.COUNTS) - 1


@EVERY
def test_views_that_are_not_aligned(interpreted, dtype):
    error, nonzero = interpreted.run(cases.unaligned, dtype, 2.0)
    assert error < 1e-14 and nonzero == 3


def test_mixed_dtypes_and_sizes_that_float32_cannot_square(interpreted):
    for error, nonzero in interpreted.run(cases.mixed_extremes):
        assert error < 1e-14 and nonzero == 11


@pytest.mark.parametrize("p", [2.0, math.inf, 1.0, 2.5])
@EVERY
def test_inf_and_nan_reach_the_sum_of_their_tensor_alone(interpreted, dtype, p):
    for bad, (first, clean, last, both), expected in interpreted.run(cases.nonfinite, dtype, p):
        assert clean == pytest.approx(expected, rel=1e-13) and math.isfinite(clean)
        assert math.isnan(both), "NaN beside inf"
        for found in (first, last):
            assert math.isnan(found) if math.isnan(bad) else found == math.inf


def test_a_tensor_that_is_not_there_counts_as_0_and_is_left_alone(interpreted):
    sums, expected, kept, none = interpreted.run(cases.absent)
    assert sums == pytest.approx(expected, rel=1e-14) and sums[1] == 0
    assert kept == [True, False, True]
    assert none == [0, 0, 0]


@pytest.mark.parametrize("factor", [0.3, 1 / 3, 1.0000001, 1e-30, 0.0, 1e30, math.inf, math.nan])
@EVERY
def test_scaling_gives_torchs_bits(interpreted, dtype, factor):
    off, moved = interpreted.run(cases.multiplied, dtype, factor)
    assert off == 0
    assert (
        moved > 1000
        or math.isnan(factor)
        or (factor == 1.0000001 and dtype in (torch.bfloat16, torch.float16))
    )


@pytest.mark.parametrize(
    "count", [cases.CHUNK + 1, 4 * cases.CHUNK + cases.SMALL[0]], ids=["small", "large"]
)
def test_a_factor_for_each_tensor(interpreted, count):
    assert interpreted.run(cases.each_by_its_own, count) == [True] * 4


def test_factors_of_many_tensors(interpreted):
    assert interpreted.run(cases.many_by_their_own) == []


def test_one_factor_for_all(interpreted):
    assert interpreted.run(cases.one_for_all) == [True] * 12


@pytest.mark.parametrize("value", [0.7, 0.0, math.inf])
@EVERY
def test_clamping_is_torchs(interpreted, dtype, value):
    assert interpreted.run(cases.clamped, dtype, value) == [True, True]


@pytest.mark.parametrize(
    "act, value", [("scale_", 1.0), ("scale_", 1 - 1e-12), ("clamp_", math.inf)]
)
def test_nothing_is_read_or_written_where_nothing_changes(interpreted, act, value):
    assert interpreted.run(cases.on_a_page_that_nobody_may_touch, act, value)


def test_the_page_would_tell():
    doomed = Elsewhere(TRITON_INTERPRET="1", PYTHONFAULTHANDLER="")
    with pytest.raises(BrokenProcessPool):
        doomed.run(cases.on_a_page_that_nobody_may_touch, "scale_", 0.5)
    doomed.pool.shutdown()


def test_the_same_bits_each_time(interpreted):
    first, moved, again, *others = interpreted.run(cases.repeated)
    assert first == moved == again
    assert others[0] == others[1] == others[2] != first


def test_offsets_beyond_2_to_the_31(interpreted):
    assert interpreted.run(cases.beyond_two_to_the_31) == (40.0, [1.0] * 10)


def test_addresses_in_a_capture(interpreted):
    elsewhere = Elsewhere(TRITON_INTERPRET="1")  # it replaces what asks the device
    same, sent, from_the_reserve, kept, texts = elsewhere.run(cases.in_a_capture)
    elsewhere.pool.shutdown()
    assert same and sent and from_the_reserve and kept == 2
    assert len(texts) == 2 and set(texts) == {
        "a CUDA graph is being captured, and what the capture needs was not prepared; run the step "
        "without capture first, on the same "
        "parameters (warm up, as torch's recipe for CUDA graphs does), once before each capture"
    }


@pytest.mark.parametrize("p", [2.0, math.inf, 1.5])
def test_what_a_clamp_would_do(interpreted, p):
    found, want = interpreted.run(cases.would_clamp, p)
    for a, b in zip(found, want, strict=True):
        assert a == pytest.approx(b, rel=1e-13, nan_ok=True)
    assert want[0][5] > 0 and not any(found[-1])


def test_asking_does_not_import_triton():
    show = (
        "import sys, torch.distributed.fsdp, torch.distributed.tensor; before = 'triton' in "
        "sys.modules\n"
        "from distclip.kernels import triton_lists as t; print(before, t.has_triton(), 'triton' in "
        "sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", show], capture_output=True, text=True, check=True, timeout=600
    )
    if done.stdout.startswith("True"):
        pytest.skip("this torch imports triton by itself")
    assert done.stdout.split() == ["False", "True", "False"]


PARTS = {"CHUNK": cases.CHUNK, "BLOCK": cases.BLOCK, "PART": 1024}
WIDE_LOAD, ANY_LOAD, WIDE_STORE = (
    r"ld\.global\S*\.v[24]\.b(?:32|64)",
    r"ld\.global",
    r"st\.global\S*\.v[24]\.b(?:32|64)",
)
TARGETS = pytest.mark.parametrize("target", [75, 80, 90, 100, 120])
# which instructions a compiler picks is its own affair
JUDGED = pytest.mark.skipif(
    find_spec("triton") is not None and tuple(map(int, version("triton").split(".")[:2])) > (3, 7),
    reason="instructions are judged with triton up to 3.7, the pinned one",
)


def counted(pattern, text):
    return len(re.findall(pattern, text))


@JUDGED
@pytest.mark.parametrize("double", [True, False], ids=["double", "float"])
@pytest.mark.parametrize(
    "target, code",
    [(target, code) for target in (75, 80, 90, 100, 120) for code in (0, 2)] + [(90, 1), (90, 3)],
)
def test_the_norm_compiles(compiler, target, code, double):
    dtype = cases.DTYPES[code]
    constants = {"TYPES": 1 << code, "P": 2.0, "DOUBLE": double} | PARTS
    ptx, loops, (registers, spilled) = compiler.run(
        cases.compiled, "chunk_sums", target, 4, constants
    )
    for loop in loops:
        assert counted(WIDE_LOAD, loop) == counted(ANY_LOAD, loop) >= 2, (
            "16 bytes at a time, several on their way"
        )
    assert not re.search(r"\b(?:atom|red)\.", ptx) and not spilled and registers <= 96
    quick = loops[0]  # the others read again what this one cannot tell
    if dtype == torch.float64 or (double and dtype == torch.float32):
        assert len(loops) == 1 and "fma.rn.f64" in quick
    else:
        assert len(loops) == 2 and counted(WIDE_LOAD, quick) >= 4
        assert ("fma.rn.f64" in quick) == double and "cvt.f64" not in quick
        assert double or ".f64" not in quick
        assert bool(re.search(r"fma\.rn(?:\.ftz)?\.f32", quick)) == (
            not double and dtype == torch.float32
        ), "products are not fused with sums"


@pytest.mark.parametrize("p", [0.3, math.inf])
def test_other_norms_compile(compiler, p):
    constants = {"TYPES": 1, "P": p, "DOUBLE": True} | PARTS
    ptx, loops, (_, spilled) = compiler.run(cases.compiled, "chunk_sums", 90, 4, constants)
    assert (
        all(counted(WIDE_LOAD, loop) == 4 for loop in loops)
        and loops
        and not spilled
        and "atom." not in ptx
    )
    if p == 0.3:  # at full precision: 0.3 as a float32 would be 0d3FD3333340000000
        assert "0d3FD3333333333333" in ptx and "0d3FD3333340000000" not in ptx


@TARGETS
def test_the_second_sum_compiles(compiler, target):
    ptx, loops, (_, spilled) = compiler.run(
        cases.compiled, "tensor_sums", target, 4, {"MOST": 2, "BLOCK": 512}
    )
    assert len(loops) == 2 and not spilled and "atom." not in ptx


@JUDGED
@pytest.mark.parametrize(
    "stride, clamp, size", [(0, False, cases.LARGE), (1, True, cases.SMALL)], ids=["scale", "clamp"]
)
@TARGETS
def test_the_change_compiles(compiler, target, stride, clamp, size):
    constants = {
        "STRIDE": stride,
        "TYPES": 15,
        "CLAMP": clamp,
        "CHUNK": cases.CHUNK,
        "WRITTEN": size[0],
    }
    _, loops, (_, spilled) = compiler.run(
        cases.compiled, "change_chunks", target, size[1], constants
    )
    wide = [loop for loop in loops if counted(WIDE_STORE, loop)]
    assert len(wide) == 4 and not spilled
    for loop in wide:
        assert counted(WIDE_LOAD, loop) == counted(ANY_LOAD, loop) == counted(WIDE_STORE, loop) >= 4


@pytest.mark.parametrize("p", [2.0, math.inf, 1.5])
def test_the_sums_of_a_clamp_compile(compiler, p):
    constants = {"P": p, "STRIDE": 1, "TYPES": 5, "CHUNK": cases.CHUNK, "PART": 1024}
    ptx, loops, (_, spilled) = compiler.run(cases.compiled, "chunk_clamps", 90, 4, constants)
    assert len(loops) == 2 and all(
        counted(WIDE_LOAD, loop) == counted(ANY_LOAD, loop) for loop in loops
    )
    assert not spilled and "atom." not in ptx
