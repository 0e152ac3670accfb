"""What a run shows of its clipping: watched layers, clip rate, skips, shares, parameter norms, and
the warnings."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
import skips
from distclip.testing import count_collectives, fully_shard
from parity.layouts import LAYOUTS, Pair, drawn, given, mesh, pair_grads, trained
from parity.oracle import total_norm

INF = math.inf


def layers_of(how):
    model = Pair()
    if how == "fsdp2":
        fully_shard(model.first, mesh=mesh(4))
        fully_shard(model, mesh=mesh(4))
    trained(model)
    if how == "plain":
        for p, whole in zip(model.parameters(), pair_grads()):
            p.grad = whole.clone()
    rows = {}
    for p in (2.0, INF):
        clipper = distclip.GradClipper(
            model, INF, norm_type=p, watch=distclip.Watch(distclip.per_layer(), every=2)
        )
        with count_collectives() as seen:
            first, second = clipper.clip_(), clipper.clip_()
        asked = clipper.measure()
        assert asked.layers == second.layers and asked.layer_norms.equal(second.layer_norms)
        rows[p] = (
            first.layers,
            first.layer_norms.numel(),
            second.layers,
            second.layer_norms.tolist(),
            seen.names,
            clipper.plan.words,
        )
    return rows


@pytest.mark.parametrize("how", ["plain", "fsdp2"])
def test_watched_layers_travel_in_the_one_message(ranks, how):
    for rows in ranks.run(layers_of, how):
        for p, (early, count, layers, norms, seen, _) in rows.items():
            halves = pair_grads()[:3], pair_grads()[3:]
            assert early == layers == ("first", "second") and count == 2
            assert norms == pytest.approx([total_norm(half, p) for half in halves], rel=1e-6)
            assert seen == ["allreduce_"] * 2


def test_watch_is_checked():
    with pytest.raises(
        distclip.ConfigError, match=r"'nothing\.\*' matches no parameter on any rank"
    ):
        distclip.GradClipper(
            Pair(), 1.0, watch=distclip.Watch(distclip.by_name({"nothing.*": 1.0}))
        )
    with pytest.raises(
        distclip.ConfigError, match=r"pass distclip\.Watch\(distclip\.per_layer\(\)\)"
    ):
        distclip.GradClipper(Pair(), 1.0, watch=distclip.per_layer())
    with pytest.raises(distclip.ConfigError, match=r"every=0 counts steps, from 1"):
        distclip.Watch(distclip.per_layer(), every=0)


def parameters_of(name):
    case = LAYOUTS[name]()
    with torch.no_grad():
        for p in case.parameters():
            local = p.to_local() if hasattr(p, "to_local") else p
            local.copy_(local * 2.0)
    before = [p.grad for p in case.parameters()]
    clipper = distclip.GradClipper(case.params, 0.5, **case.options)
    with count_collectives() as seen:
        report = clipper.measure(of="param")
    elements = sum(row.elements for row in clipper.plan.rows)
    kept = all(a is b.grad for a, b in zip(before, case.parameters()))
    return (
        report.total_norm.item(),
        elements,
        seen.names,
        kept,
        report.clip_coef.item(),
        bool(report.clipped),
    )


@pytest.mark.parametrize("name", ["ddp", "fsdp1_full_shard_orig", "fsdp2_uneven", "hsdp_2x2"])
def test_norms_of_parameters(ranks, name):
    """All weights are 1 before they are doubled."""
    for norm, elements, seen, kept, coef, clipped in ranks.run(parameters_of, name):
        assert norm == pytest.approx(2 * elements**0.5, rel=1e-6)
        assert (seen, kept, coef, clipped) == (["allreduce_"], True, 1, False)


def diverged():
    model = Pair()
    if dist.get_rank() == 2:
        model.second.c.data += 1
    clipper = distclip.GradClipper(model, 1.0)
    try:
        clipper.measure(of="param")
    except distclip.AgreementError as error:
        return str(error)


def test_parameters_that_drifted_apart_are_named(ranks):
    for text in ranks.run(diverged):
        assert text.startswith(
            "step 1: parameters that should be copies are not equal:\nsecond.c: "
            "norm 8 on rank 0-1,3, norm 16 on rank 2"
        )


def test_what_is_measured_is_checked():
    with pytest.raises(
        distclip.ConfigError,
        match=r"measure\(of='weights'\): it is 'grad' or "
        r"'param'",
    ):
        distclip.GradClipper(Pair(), 1.0).measure(of="weights")


def one(value):
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.tensor([value])
    return p


@skips.told()
def test_clip_rate_and_skips():
    p = one(1.0)
    clipper = distclip.GradClipper([("w", p)], 2.0)
    seen = []
    for value in (1.0, 4.0, 4.0, math.nan, 4.0, 1.0):
        p.grad = torch.tensor([value])
        report = clipper.clip_()
        seen.append((round(report.clip_rate.item(), 4), report.skips.item()))
        clipper.measure()
    assert seen == [(0, 0), (0.5, 0), (0.6667, 0), (0.5, 1), (0.6, 1), (0.5, 1)], (
        "measure() does not count"
    )
    fresh = distclip.GradClipper([("w", p)], 2.0)
    fresh.load_state_dict(clipper.state_dict())
    assert fresh.clip_().clip_rate.item() == pytest.approx(3 / 7) and fresh.last_report.skips == 1


def test_the_window_rolls():
    p = one(4.0)
    clipper = distclip.GradClipper([("w", p)], 2.0)
    for _ in range(300):
        p.grad = torch.tensor([4.0])
        clipper.clip_()
    for _ in range(400):
        p.grad = torch.tensor([1.0])
        report = clipper.clip_()
    assert report.clip_rate.item() == pytest.approx(100 / 500)


@pytest.mark.parametrize(
    "policy, told", [(distclip.FixedNorm(0.5), True), (distclip.Normalize(0.5), False)]
)
def test_clipping_nearly_every_step_is_told_once(policy, told):
    p = one(4.0)
    clipper = distclip.GradClipper([("w", p)], policy=policy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(520):
            p.grad = torch.tensor([4.0 if i % 30 else 0.1])
            clipper.clip_()
    texts = [str(w.message) for w in caught]
    assert len(texts) == told
    if told:
        assert texts[0] == (
            "97 % of the last 500 steps were clipped by FixedNorm(max_norm=0.5): a threshold below "
            "nearly every norm does not catch "
            "outliers but sets the length of every step, like a smaller learning rate, and may "
            "starve learning. Raise it (`distclip "
            "suggest RUN.jsonl` shows what others would do), or use distclip.Normalize if that is "
            "meant"
        )


def test_steps_that_ended_in_an_error_do_not_count_as_clipped():
    p = one(4.0)
    clipper = distclip.GradClipper([("w", p)], 0.5, on_nonfinite="raise", skip_limit=1000)
    for i in range(510):
        p.grad = torch.tensor([math.nan if i < 500 else 4.0])
        if i < 500:
            with pytest.raises(distclip.NonFiniteError):
                clipper.clip_()
        else:
            rate = clipper.clip_().clip_rate.item()  # a warning would be an error
            assert rate == pytest.approx((i - 499) / 500)


def test_which_group_dominates():
    named = [("a.w", one(3.0)), ("b.w", one(4.0))]
    report = distclip.GradClipper(named, 1.0, groups=distclip.per_layer()).measure()
    assert report.group_shares.tolist() == pytest.approx([9 / 25, 16 / 25])
    report = distclip.GradClipper(named, 1.0, groups=distclip.per_layer(), norm_type=INF).measure()
    assert report.group_shares.tolist() == [0.75, 1]


def many_groups(count):
    named = [given(f"p{i}", 4) for i in range(count)]
    clipper = distclip.GradClipper(named, 8.0, groups=distclip.per_parameter())
    with count_collectives() as seen:
        report = clipper.clip_()
    norms = {f"p{i}": drawn(f"p{i}", 4).double().norm().item() for i in range(count)}
    off = max(
        abs(norm - norms[name]) for name, norm in zip(report.groups, report.group_norms.tolist())
    )
    after = max(abs(p.grad.norm().item() - min(8.0, norms[name])) for name, p in named)
    return (
        seen.names,
        off,
        after,
        sum(n > 8 for n in norms.values()),
        sum(n <= 8 for n in norms.values()),
    )


def test_ten_thousand_groups_are_one_message(ranks):
    for seen, off, after, above, below in ranks.run(many_groups, 10_000):
        assert seen == ["allreduce_"] and off < 1e-5 and after < 1e-5
        assert above > 1000 and below > 100, "vacuous"
