"""Power sums against a float64 oracle: any size, any dtype, any p."""

import math

import pytest
import torch

from distclip.kernels.reference import power_sums, scale_
from distclip.p_norm import norm_of, rounded
from parity.oracle import NORMS, total_norm

SOURCE = torch.Generator().manual_seed(1)


def randn(*shape):
    return torch.randn(shape, generator=SOURCE)


KINDS = {
    "random": randn(100_003),
    "rows": randn(64 * 50),
    "few": randn(5),
    "scalar": randn(),
    "constant": torch.full((100_000,), 0.1),
    "huge": randn(1000) * 1e20,
    "tiny": randn(1000) * 1e-25,
    "both": torch.cat([randn(5000) * 1e-25, randn(300) * 1e18]),
    "mostly zeros": torch.cat([torch.zeros(90_000), randn(70), torch.zeros(5000)]),
    "tiny among zeros": torch.cat([torch.zeros(90_000), torch.full((70,), 1e-30)]),
    "transposed": randn(300, 70).t(),
    "every other": randn(10_000)[::2],
    "double": randn(1000).double() * 1e100,
    "bf16": (randn(10_000) * 1e25).bfloat16(),
    "fp16": torch.full((10_000,), 60000.0).half(),
    "small fp16": (randn(3000) * 1e-6).half(),
    "complex": torch.complex(randn(500), randn(500)),
}


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_norm(kind, p):
    if kind == "double" and p == 8:
        pytest.skip("float64 overflows where torch's does")
    tensor = KINDS[kind]
    got = norm_of(power_sums([tensor], p), p).item()
    want = total_norm([tensor.abs() if tensor.is_complex() else tensor], p)
    assert got == pytest.approx(want, rel=1e-6, abs=0)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_many_small_ones_of_some_sizes(dtype, p):
    """More than are computed at a time, in no order, some empty, some 0-dim, one not finite."""
    grads = [
        randn(*shape).to(dtype)
        for _ in range(120)
        for shape in ((1000,), (), (3, 5), (2048,), (0,), (64,), (2, 1001))
    ]
    grads[7 * 50] = torch.full((1000,), math.inf, dtype=dtype)
    got = norm_of(power_sums(grads, p), p).tolist()
    assert got.pop(7 * 50) == math.inf
    del grads[7 * 50]
    assert got == pytest.approx(
        [total_norm([grad], p) if grad.numel() else 0.0 for grad in grads], rel=1e-6, abs=0
    )


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(bad, p):
    for place in (0, 70, 3999):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            grad = randn(4000).to(dtype)
            grad[place] = bad
            assert power_sums([randn(3), grad], p).isfinite().tolist() == [True, False]


@pytest.mark.parametrize("p", NORMS)
def test_empty_and_sparse(p):
    rows = torch.sparse_coo_tensor(
        torch.tensor([[1, 1, 3]]), randn(3, 2), (5, 2), check_invariants=True
    )
    sums = power_sums([torch.empty(0, 4), rows], p)
    assert sums[0] == 0 and norm_of(sums, p)[1].item() == pytest.approx(
        total_norm([rows], p), rel=1e-6
    )
    assert power_sums([], p).shape == (0,)


# Rounding to a precision

AWKWARD = [
    0.0,
    1.0,
    1e300,
    5e-324,
    1e-320,
    2.5e-308,
    1e20,
    1e-25,
    0.1,
    16777215.0,
    16777217.5,
    -0.3,
    -1e300,
]
AWKWARD += [16777217.0, 16777219.0, -16777217.0, 33554431.0, 2.0**48 + 1, 2.0**48 + 3]  # ties


TIE = {24: 2.0**-20, 48: 2.0**-4}  # how near to half a place counts as half a place


@pytest.mark.parametrize("bits", [24, 48])
def test_rounded_to_so_many_bits(bits):
    given = torch.cat(
        [
            torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
            torch.tensor(AWKWARD, dtype=torch.float64),
        ]
    )
    given = torch.cat([given, given * 2.0**20, given * 2.0**-300])
    for value, near in zip(given.tolist(), rounded(given, bits).tolist(), strict=True):
        mantissa, exponent = math.frexp(abs(value))
        if exponent > -1021:  # a normal number
            whole, part = divmod(math.ldexp(mantissa, bits), 1)
            tie = -TIE[bits] <= part - 0.5 < TIE[bits]
            assert abs(near) == math.ldexp(
                whole + (whole % 2 if tie else part > 0.5), exponent - bits
            )
    assert torch.equal(rounded(rounded(given, bits), bits), rounded(given, bits))
    assert torch.equal(rounded(-given, bits), -rounded(given, bits))


def test_rounded_as_float32_in_its_range():
    given = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).abs()
    given[:3] = torch.tensor([16777217.0, 16777219.0, 33554431.0])
    assert torch.equal(rounded(given, 24), given.float().double())
    assert rounded(given[0], 24).shape == () and rounded(given[:0], 24).shape == (0,)
    assert torch.equal(rounded(given.view(2, -1).t(), 24), given.float().double().view(2, -1).t())


def test_the_last_bits_do_not_matter_on_a_tie():
    """A gradient of 81 equal elements has 9 times their size as its norm, often half-way between
    two float32 numbers."""
    sizes = torch.randint(
        1 << 23, 1 << 24, (1000,), generator=torch.Generator().manual_seed(3)
    ).double()
    norms = 9 * sizes
    ties = norms[(norms.view(torch.int64) & (1 << 29) - 1) == 1 << 28]
    assert len(ties) > 50, "vacuous"
    for last in range(-3, 4):
        other = (ties.view(torch.int64) + last).view(torch.float64)
        assert torch.equal(rounded(other, 24), ties.float().double())


@pytest.mark.parametrize("bits", [24, 48])
def test_what_rounding_leaves(bits):
    """NaN whatever its bits, inf, and what would round up to inf."""
    nans = torch.tensor(
        [-1, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000001, 0x7FF8000000000000, -(1 << 51)]
    ).view(torch.float64)
    assert nans.isnan().all() and rounded(nans, bits).isnan().all()
    largest = torch.finfo(torch.float64).max
    kept = torch.tensor([math.inf, largest, 0.0], dtype=torch.float64)
    assert torch.equal(rounded(kept, bits), kept)


def test_a_factor_beyond_the_range_of_a_dtype_is_inf_there():
    for value in (1e39, torch.tensor([1e39], dtype=torch.float64)):
        tensor = torch.ones(2)
        scale_([tensor], value if isinstance(value, torch.Tensor) else [value])
        assert tensor.tolist() == [math.inf] * 2
