"""The native kernels against float64 oracles and torch's own operations: every dtype, p and size,
on every instruction set here."""

import math
import mmap
import random
import warnings

import pytest
import torch

from distclip.kernels import reference
from distclip.kernels.native import load_library
from kernels.native_cases import (
    BLOCK,
    DTYPES,
    NO_LIBRARY,
    NORMS,
    addresses,
    layout_of,
    power_sum,
    randn,
)

pytestmark = pytest.mark.skipif(NO_LIBRARY, reason="no compiled library")
SIZES = [0, 1, 7, 63, 64, 65, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17]
# subnormal
TINY = {torch.float32: 1e-42, torch.float64: 1e-310, torch.bfloat16: 1e-39, torch.float16: 1e-6}


@pytest.fixture(params=["plain", "avx2", "avx512"])
def instructions(request):
    """The test runs with the best instruction set up to this one."""
    most = ["plain", "avx2", "avx512"].index(request.param)
    if load_library().distclip_choose(most) != most:
        load_library().distclip_choose(2)
        pytest.skip(f"this machine has no {request.param}")
    yield
    load_library().distclip_choose(2)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_power_sums(instructions, dtype, p):
    tensors = [randn(size, dtype, seed=size, offset=size % 2) for size in SIZES]
    sums = layout_of(tensors).power_sums(addresses(tensors), p)
    assert sums.dtype == torch.float64
    assert sums.tolist() == pytest.approx(
        [power_sum(tensor, p) for tensor in tensors], rel=1e-12, abs=0
    )


@pytest.mark.parametrize("p", NORMS)
def test_numbers_at_the_edges(instructions, p):
    tensors = [torch.full((100,), TINY[dtype], dtype=dtype) for dtype in DTYPES]
    tensors += [torch.tensor([-0.0, 0.0] * 40, dtype=dtype) for dtype in DTYPES]
    tensors += [
        torch.full((100,), size, dtype=dtype)
        for size in (1e20, -1e-25)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    tensors += [torch.full((100,), -torch.finfo(torch.float16).max, dtype=torch.float16)]
    sums = layout_of(tensors).power_sums(addresses(tensors), p)
    assert sums.tolist() == pytest.approx(
        [power_sum(tensor, p) for tensor in tensors], rel=1e-12, abs=0
    )
    assert all(tensor.abs().max() > 0 for tensor in tensors[:4]), (
        "nothing was flushed to zero on the way"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_sixteen_bits(instructions, dtype):
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    one_each = layout_of([numbers[i : i + 1] for i in range(len(numbers))])
    found = one_each.power_sums([numbers.data_ptr() + 2 * i for i in range(len(numbers))], 1.0)
    assert torch.equal(found, numbers.double().abs())
    for factor in (0.3137, 3.0, 2.0**-12):
        ours, theirs = numbers.clone(), numbers.clone()
        layout_of([ours]).scale_(addresses([ours]), factor)
        torch._foreach_mul_([theirs], torch.tensor(factor))
        assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(instructions, bad, dtype, p):
    tensors = [randn(size, dtype) for size in (40, 1000, 2 * BLOCK + 3) for _ in range(3)]
    for tensor, place in zip(tensors[::3], (0, 999, 2 * BLOCK), strict=True):
        tensor[place] = bad
    for sums in (
        layout_of(tensors).power_sums(addresses(tensors), p),
        layout_of(tensors).clamped_sums(addresses(tensors), torch.tensor(0.5).double(), p)[:, 0],
    ):
        assert sums.isfinite().tolist() == [False, True, True] * 3
        assert sums.isnan().tolist() == [math.isnan(bad), False, False] * 3


def test_nan_wins_over_inf(instructions):
    for first, second in ((math.nan, math.inf), (math.inf, math.nan)):
        grad = torch.zeros(3 * BLOCK)
        grad[5], grad[2 * BLOCK + 5] = first, second
        assert layout_of([grad]).power_sums(addresses([grad]), math.inf).isnan().all()


def test_double_overflows_where_torch_does(instructions):
    grad = torch.full((100,), 1e200, dtype=torch.float64)
    assert layout_of([grad]).power_sums(addresses([grad]), 2.0).item() == math.inf
    assert torch.linalg.vector_norm(grad).isinf()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.3137, 1e-6, -2.5, math.inf, math.nan])
def test_scaling_has_the_bits_of_torch(instructions, dtype, factor):
    ours = [randn(size, dtype, seed=size, offset=size % 2) for size in SIZES]
    for tensor in ours[1:]:
        tensor[-1] = math.inf
    theirs = [tensor.clone() for tensor in ours]
    layout_of(ours).scale_(addresses(ours), factor)
    reference.scale_(theirs, [factor] * len(theirs))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.isnan(), other.isnan()) and torch.equal(
            mine.nan_to_num(7), other.nan_to_num(7)
        )


def test_each_by_its_own_factor_and_one_leaves_the_memory_alone(instructions):
    read_only = mmap.mmap(-1, 4000, prot=mmap.PROT_READ)  # a write would end the process
    tensors = [randn(1000, dtype) for dtype in DTYPES] + [randn(1000, torch.float32)]
    before = [tensor.clone() for tensor in tensors]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch: the buffer is not writable
        tensors[-1] = torch.frombuffer(read_only, dtype=torch.float32)
    layout_of(tensors).scale_(
        addresses(tensors), torch.tensor([0.5, 1.0, 0.25, 1.0, 1.0], dtype=torch.float64)
    )
    for tensor, old, factor in zip(tensors[:4], before, (0.5, 1, 0.25, 1), strict=False):
        assert torch.equal(tensor, old * factor)
    layout_of(tensors[-1:]).clamp_(addresses(tensors[-1:]), math.inf)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.0, 1e-7, math.inf, math.nan])
def test_clamping_has_the_bits_of_torch(instructions, dtype, value):
    ours = [randn(size, dtype, seed=size, offset=size % 2) for size in SIZES]
    for tensor in ours[3:]:
        tensor[0], tensor[1], tensor[-1] = math.nan, math.inf, -math.inf
    theirs = [tensor.clone() for tensor in ours]
    layout_of(ours).clamp_(addresses(ours), value)
    reference.clamp_(theirs, torch.full((len(theirs),), value, dtype=torch.float64))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.isnan(), other.isnan()) and torch.equal(
            mine.nan_to_num(7), other.nan_to_num(7)
        )


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_terms_of_the_cosine(instructions, dtype, p):
    tensors = [randn(size, dtype, seed=size, offset=size % 2) for size in SIZES]
    values = torch.tensor(
        [0.1, 0.7, 5.0, math.inf, 0.0, 1 / 3, 2.0, 0.7, 0.7, 0.01, 1.5], dtype=torch.float64
    )
    found = layout_of(tensors).clamped_sums(addresses(tensors), values, p)
    assert found.shape == (len(tensors), 6)
    beyond = 0.0
    for tensor, value, row in zip(tensors, values.tolist(), found.tolist(), strict=True):
        limit = value if dtype == torch.float64 else torch.tensor(value).float().item()
        raw = tensor.double()
        kept = raw.clamp(-limit, limit)
        want = [
            power_sum(raw, p),
            power_sum(kept, p),
            power_sum(raw, 2),
            power_sum(kept, 2),
            (raw * kept).sum().item(),
        ]
        assert row == pytest.approx([*want, (raw.abs() > limit).sum().item()], rel=1e-12, abs=0)
        beyond += row[5]
    assert beyond > 1000


def test_clamped_sums_are_those_of_the_torch_path(instructions):
    tensors = [randn(5000, dtype) for dtype in DTYPES]
    tensors[0][7] = math.nan
    values = torch.tensor([0.5, 0.7, 0.1, math.nan], dtype=torch.float64)
    for p in (1.0, 2.0, 3.0, math.inf):
        ours = layout_of(tensors).clamped_sums(addresses(tensors), values, p)
        assert torch.allclose(
            ours, reference.clamped_sums(tensors, values, p), rtol=1e-6, equal_nan=True
        )


def test_no_gradient(instructions):
    tensors = [
        randn(2 * BLOCK + 5, torch.float32),
        randn(100, torch.bfloat16),
        randn(50, torch.float32),
    ]
    whole, layout = layout_of(tensors).power_sums(addresses(tensors), 2.0), layout_of(tensors)
    for absent in range(3):
        pointers = addresses(tensors)
        pointers[absent] = 0
        want = whole.clone()
        want[absent] = 0
        assert torch.equal(layout.power_sums(pointers, 2.0), want)
        assert (layout.clamped_sums(pointers, torch.tensor(1.0).double(), 3.0)[absent] == 0).all()
        layout.scale_(pointers, 1.5)  # must not write to address 0
        layout.clamp_(pointers, math.inf)
        layout.scale_(pointers, 1 / 1.5)
        whole = layout.power_sums(addresses(tensors), 2.0)
    assert layout_of([]).power_sums([], 2.0).shape == (0,)
    assert layout_of([]).clamped_sums([], torch.ones(0).double(), 2.0).shape == (0, 6)


@pytest.mark.parametrize("seed", range(8))
def test_random_lists(instructions, seed):
    choose = random.Random(seed)
    p = choose.choice(NORMS)
    tensors = []
    for i in range(choose.randrange(1, 60)):
        size = choose.choice(
            [0, 1, choose.randrange(200), choose.randrange(5000), choose.randrange(3 * BLOCK)]
        )
        tensors.append(
            randn(size, choose.choice(DTYPES), seed=100 * seed + i, offset=choose.randrange(4))
        )
    layout, pointers = layout_of(tensors), addresses(tensors)
    factors = torch.tensor(
        [choose.choice([1.0, choose.random()]) for _ in tensors], dtype=torch.float64
    )
    copies = [tensor.clone() for tensor in tensors]
    layout.scale_(pointers, factors)
    reference.scale_(copies, factors.tolist())
    assert all(torch.equal(mine, other) for mine, other in zip(tensors, copies, strict=True))
    assert layout.power_sums(pointers, p).tolist() == pytest.approx(
        [power_sum(copy, p) for copy in copies], rel=1e-12, abs=0
    )


def test_wrong_lengths_are_refused():
    layout = layout_of([torch.zeros(3)] * 2)
    with pytest.raises(ValueError, match="1 addresses came for a layout of 2 tensors"):
        layout.power_sums([0], 2.0)
    with pytest.raises(
        ValueError,
        match=r"values of shape \(3,\) came for 2 tensors; give one "
        r"each, or one for all",
    ):
        layout.clamp_([0, 0], torch.ones(3))
