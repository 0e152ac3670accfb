"""Value clipping in every layout: elements bounded where they are, and norm and cosine of the whole
gradient from the one collective."""

import math
import warnings
from collections import Counter

import pytest
import torch

import distclip
from distclip.testing import count_collectives
from parity.layouts import LAYOUTS
from parity.oracle import total_norm
from parity.test_layouts import own_grads, tolerance

BOUND = 3.0  # gradients are whole numbers of either sign, up to 8


def clamp_layout(name):
    case = LAYOUTS[name]()
    if case.built:
        return None  # built with thresholds of their own
    grads = own_grads(case)
    before = [g.to_dense().clone() for g in grads]
    clipper = distclip.GradClipper(case.params, policy=distclip.FixedValue(BOUND), **case.options)
    with count_collectives() as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the gradient is turned
        report = clipper.clip_()
    worst = max(
        (
            ((g.to_dense().double() - b.double().clamp(-BOUND, BOUND)).abs() - tolerance(b))
            .max()
            .item()
            for g, b in zip(grads, before)
            if g.numel()
        ),
        default=0.0,
    )
    numbers = [t.item() for t in (report.total_norm, report.norm_after, report.cosine[0])]
    return numbers, bool(report.clipped), worst, Counter(seen.names), case.want


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(ranks, name):
    rows = ranks.run(clamp_layout, name)
    if rows[0] is None:
        pytest.skip("the clippers of this layout come with a threshold")
    for (norm, after, cosine), clipped, worst, seen, whole in rows:
        raw = torch.cat([g.to_dense().double().flatten() for g in whole])
        bounded = raw.clamp(-BOUND, BOUND)
        assert norm == pytest.approx(total_norm(whole), rel=1e-6)
        assert (
            after == pytest.approx(float(bounded.norm()), rel=1e-6)
            and clipped
            and after < 0.9 * norm
        ), "vacuous"
        assert cosine == pytest.approx(
            float(torch.dot(raw, bounded) / raw.norm() / bounded.norm()), rel=1e-6
        )
        assert worst <= 0 and seen == {"allreduce_": 1}
    assert len({tuple(map(float.hex, numbers)) for numbers, *_ in rows}) == 1


def alone(*grads, **options):
    params = []
    for i, grad in enumerate(grads):
        p = torch.nn.Parameter(torch.zeros(len(grad)))
        p.grad = torch.tensor(grad)
        params.append((f"p{i}", p))
    return distclip.GradClipper(params, **options), params


def test_the_cosine_of_each_group_and_of_what_is_not_clamped():
    rules = {"p0": distclip.FixedValue(1.0), "p1": 0.5}
    clipper, _ = alone(
        [2.0, 1.0], [3.0], [0.3], policy=distclip.FixedValue(5.0), groups=distclip.by_name(rules)
    )
    report = clipper.clip_()
    assert report.groups == ("p0", "p1", "rest")
    assert report.cosine.tolist() == pytest.approx([3 / 10**0.5, 1, 1], rel=1e-6)
    assert alone([0.0], policy=distclip.FixedValue(1.0))[0].clip_().cosine.item() == 1, "of nothing"


def test_with_the_largest_element_as_norm_it_is_not_known():
    clipper, params = alone([2.0, 1.0], policy=distclip.FixedValue(1.0), norm_type=math.inf)
    report = clipper.clip_()
    assert (
        report.cosine.isnan().item()
        and report.norm_after.item() == 1
        and params[0][1].grad.tolist() == [1, 1]
    )


def test_a_turned_gradient_is_told_once():
    clipper, params = alone([9.0, 0.5, 0.5], policy=distclip.FixedValue(0.5))
    with pytest.warns(
        RuntimeWarning,
        match=r"cosine with the raw one is 0\.64\. Raise clip_value, "
        r"or clip the norm",
    ) as warned:
        clipper.clip_()
    assert warned[0].filename == __file__, "the user's line"
    params[0][1].grad = torch.tensor([9.0, 0.5, 0.5])
    clipper.clip_()
