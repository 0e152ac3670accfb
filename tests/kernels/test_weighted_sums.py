"""Weighted sums of a rank's power sums: by the compiled library and by torch."""

import math

import pytest
import torch

from distclip.kernels.native import WeightedSums
from kernels.native_cases import NO_LIBRARY

WAYS = [pytest.param(True, marks=pytest.mark.skipif(NO_LIBRARY, reason="no library")), False]


@pytest.mark.parametrize("is_native", WAYS)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1000, 20011])
def test_against_exact_sums(is_native, count):
    draw = torch.Generator().manual_seed(count)
    weights = torch.rand(2, count, dtype=torch.float64, generator=draw)
    values = torch.rand(count, dtype=torch.float64, generator=draw) * 1e6
    want = [math.fsum(map(lambda w, v: w * v, row, values.tolist())) for row in weights.tolist()]
    sums = WeightedSums(weights, is_native)
    assert sums.of(values) == pytest.approx(want, rel=1e-13, abs=0)
    assert sums.of(2 * values) == pytest.approx([2 * total for total in want], rel=1e-13, abs=0)


@pytest.mark.parametrize("is_native", WAYS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 5, 12])
def test_what_is_not_finite_shows(is_native, bad, place):
    values = torch.ones(13, dtype=torch.float64)
    values[place] = bad
    (total,) = WeightedSums(torch.full((1, 13), 0.5, dtype=torch.float64), is_native).of(values)
    assert not math.isfinite(total)


@pytest.mark.parametrize("is_native", WAYS)
def test_rows_that_are_views_count_as_they_are(is_native):
    columns = torch.arange(26.0, dtype=torch.float64).view(13, 2)
    values = torch.ones(13, dtype=torch.float64)
    assert WeightedSums(columns.t(), is_native).of(values) == columns.sum(0).tolist()


@pytest.mark.parametrize("is_native", WAYS)
@pytest.mark.parametrize("columns", [[], [4], [11, 2, 7]])
def test_some_entries_by_their_own_weights(is_native, columns):
    draw = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 13, dtype=torch.float64, generator=draw)
    values = torch.rand(len(columns), dtype=torch.float64, generator=draw)
    want = (weights[:, columns] * values).sum(1).tolist()
    some = WeightedSums(weights, is_native).select(torch.tensor(columns, dtype=torch.int64))
    assert some.of(values) == pytest.approx(want, rel=1e-13, abs=0)
