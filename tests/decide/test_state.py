"""What a clipper remembers is in Python's numbers on the CPU, however many groups there are."""

import pytest
import torch
from torch import nn

import distclip


@pytest.mark.parametrize("groups", [1, 40])
def test_the_clip_rate_is_exact(groups):
    params = []
    for i in range(groups):
        p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        params.append((f"p{i}", p))
    clipper = distclip.GradClipper(params, 1.0, groups=distclip.per_parameter())
    rates = []
    for size in (1e-3, 5.0, 5.0):
        for _, p in params:
            p.grad = torch.full((3,), size, dtype=torch.float64)
        report = clipper.clip_()
        rates.append(report.clip_rate.item())
        assert report.clipped.item() == (size == 5.0)
    assert rates == [0.0, 1 / 2, 2 / 3]
    state = clipper._state.history
    assert [type(n) for n in (state.num_calls, state.num_skips, state.clip_rate)] == [
        int,
        int,
        float,
    ]
