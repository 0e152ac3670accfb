"""AGC: each unit by its own coefficient, whichever way weights are cut, against a float64
computation of whole tensors."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import distclip
import skips
from distclip.testing import count_collectives
from parity.layouts import LAYOUTS, Net, drawn, mesh

EPS = 1e-3
SHAPES = {"w": (7, 5), "conv": (6, 3, 2, 2), "b": (6,), "zero": (3, 4), "s": ()}


def unitwise(weight, grad, clipping):
    """The clipped gradient and its units' coefficients, float64; a tensor of less than two
    dimensions is one unit."""
    rows = 1 if weight.ndim < 2 else weight.shape[0]
    w, g = (t.double().reshape(rows, -1).norm(dim=1) for t in (weight, grad))
    coef = (clipping * w.clamp(min=EPS) / g.clamp(min=1e-300)).clamp(max=1)
    return (grad.double().reshape(rows, -1) * coef[:, None]).reshape(grad.shape), coef


def full(t):
    return t.full_tensor() if isinstance(t, DTensor) else t.detach()


def clip_and_compare(named, clipping, **options):
    """What differs from the oracle: a rank's row of numbers."""
    before = {name: (full(p.detach()).clone(), full(p.grad).clone()) for name, p in named}
    clipper = distclip.GradClipper(named, policy=distclip.AGC(clipping), **options)
    with count_collectives() as seen:
        report = clipper.clip_()
    worst, coefs, squares, after = 0.0, [], 0.0, 0.0
    for name, p in named:
        want, coef = unitwise(*before[name], clipping)
        worst = max(
            worst, float((full(p.grad).double() - want).norm() / want.norm().clamp(min=1e-30))
        )
        coefs += coef.tolist()
        squares, after = (
            squares + float(before[name][1].double().square().sum()),
            after + float(want.square().sum()),
        )
    return {
        "worst": worst,
        "clipped": sum(c < 1 for c in coefs),
        "kept": sum(c == 1 for c in coefs),
        "norm": report.total_norm.item() / squares**0.5,
        "after": report.norm_after.item() / after**0.5,
        "said": bool(report.clipped),
        "bits": (report.total_norm.item().hex(), report.norm_after.item().hex()),
        "seen": Counter(seen.names),
    }


def right(rows, distributed=True):
    for row in rows:
        assert row["worst"] <= 1e-6
        assert row["clipped"] and row["kept"] and row["said"], "vacuous"
        assert row["norm"] == pytest.approx(1, abs=1e-6) and row["after"] == pytest.approx(
            1, abs=1e-6
        )
        assert row["seen"] == ({"allreduce_": 1} if distributed else {})
    assert len({row["bits"] for row in rows}) == 1


def placed(over, placements):
    """Parameters with drawn weights and gradients, each placed by what fits its dimensions."""
    named = []
    for name, shape in SHAPES.items():
        weight, grad = drawn(f"{name} weight", *shape) / 4, drawn(f"{name} grad", *shape) / 64
        if name == "zero":
            weight = torch.zeros(shape)
        if over is not None:
            fits = [
                Replicate() if isinstance(p, Shard) and p.dim >= len(shape) else p
                for p in placements
            ]
            weight, grad = (
                distribute_tensor(t, over, fits, src_data_rank=None) for t in (weight, grad)
            )
        param = nn.Parameter(weight)
        param.grad = grad
        named.append((name, param))
    return named


PLACEMENTS = {
    "copies": ((4,), [Replicate()]),
    "rows": ((4,), [Shard(0)]),
    "columns": ((4,), [Shard(1)]),
    "rows and columns": ((2, 2), [Shard(0), Shard(1)]),
    "columns and rows": ((2, 2), [Shard(1), Shard(0)]),
    "columns, copied": ((2, 2), [Replicate(), Shard(1)]),
    "columns twice": ((2, 2), [Shard(1), Shard(1)]),
}


def on_a_mesh(shape, placements):
    return clip_and_compare(placed(mesh(*shape), placements), 0.05)


@pytest.mark.parametrize("how", PLACEMENTS)
def test_any_shard_dimension(ranks, how):
    right(ranks.run(on_a_mesh, *PLACEMENTS[how]))


def test_one_process():
    right([clip_and_compare(placed(None, ()), 0.05)], distributed=False)


def wrapped(name):
    case = LAYOUTS[name]()
    return clip_and_compare(
        [(n.removeprefix("module."), p) for n, p in case.params.named_parameters()], 3.0
    )


@pytest.mark.parametrize(
    "name",
    [
        "ddp",
        "fsdp2_uneven",
        "fsdp2_empty_shards",
        "hsdp_2x2",
        "fsdp2_cpu_offload",
        "tp_colwise_rowwise",
        "tp_fsdp2",
    ],
)
def test_under_the_wrappers(ranks, name):
    right(ranks.run(wrapped, name))


def scaled_by_a_scaler():
    named = placed(mesh(4), [Shard(1)])
    optimizer = torch.optim.SGD([p for _, p in named], 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    starts = {name: (full(p.detach()).clone(), full(p.grad).clone()) for name, p in named}
    for _, p in named:
        p.grad = p.grad * 8
    report = distclip.GradClipper(named, policy=distclip.AGC(0.05)).step(
        optimizer, scaler=scaler, grad_scale=0.5
    )
    worst = max(
        float(
            (
                starts[n][0].double()
                - full(p.detach()).double()
                - unitwise(starts[n][0], starts[n][1] / 2, 0.05)[0]
            )
            .abs()
            .max()
        )
        for n, p in named
    )
    return worst, bool(report.clipped)


def test_after_unscaling(ranks):
    for worst, clipped in ranks.run(scaled_by_a_scaler):
        assert worst <= 2e-7 and clipped


def mixed_rules():
    named = placed(mesh(4), [Shard(1)])
    before = {n: full(p.grad).double() for n, p in named}
    rules = {"b": distclip.Exempt(in_total=True), "conv": distclip.AGC(0.01), "s": 0.5}
    report = distclip.GradClipper(
        named, policy=distclip.AGC(0.05), groups=distclip.by_name(rules)
    ).clip_()
    weights = {n: full(p.detach()) for n, p in named}
    off = 0.0
    for n, p in named:
        want = (
            unitwise(weights[n], before[n], {"conv": 0.01}.get(n, 0.05))[0]
            if n not in ("b", "s")
            else before[n]
        )
        if n == "s":
            want = want * min(1, 0.5 / float(want.norm()))
        off = max(off, float((full(p.grad).double() - want).abs().max()))
    return (
        off,
        report.groups,
        report.total_norm.item() / float(torch.stack([g.norm() for g in before.values()]).norm()),
    )


def test_beside_other_rules(ranks):
    for off, groups, total in ranks.run(mixed_rules):
        assert (
            off <= 1e-7
            and groups == ("b", "conv", "rest", "s")
            and total == pytest.approx(1, abs=1e-6)
        )


@skips.told()
def bad_on_one_rank():
    import torch.distributed as dist

    named = placed(mesh(4), [Shard(1)])
    if dist.get_rank() == 2:
        named[0][1].grad.to_local()[0] = float("nan")
    report = distclip.GradClipper(named, policy=distclip.SkipSpikes(distclip.AGC(0.05))).clip_()
    return bool(report.skipped), all(p.grad is None for _, p in named), int(report.skips)


def test_a_bad_step_is_skipped(ranks):
    assert ranks.run(bad_on_one_rank) == [(True, True, 1)] * 4


def refused(what):
    if what == "fsdp1":
        model, options = LAYOUTS["fsdp1_full_shard_orig"]().params, {}
    else:
        model, options = Net(), {"norm_type": 1.0}
    try:
        distclip.GradClipper(model, policy=distclip.AGC(), **options)
    except distclip.DistclipError as error:
        return str(error)


def test_what_it_cannot_do_is_told(ranks):
    for text in ranks.run(refused, "fsdp1"):
        assert (
            "FSDP1 shard, 4 parts, which cuts units anywhere; clip by units under fully_shard "
            "(FSDP2)" in text
        )
    for text in ranks.run(refused, "norm"):
        assert text == (
            "AGC(clipping=0.01, eps=0.001) works with 2-norms of units; norm_type=1.0 "
            "cannot go with it, leave it at 2"
        )


@pytest.mark.parametrize(
    "bad", [dict(clipping=0.0), dict(clipping=-1), dict(eps=0.0), dict(eps=float("nan"))]
)
def test_arguments(bad):
    with pytest.raises(
        distclip.ConfigError,
        match=r"must be positive and finite; the paper takes "
        r"clipping=0.01, eps=1e-3",
    ):
        distclip.AGC(**bad)


def test_low_precision_is_multiplied_in_float32():
    p = nn.Parameter(torch.full((2, 1000), 0.5, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 3.0)
    p.grad[1] = 0.001
    distclip.GradClipper([("w", p)], policy=distclip.AGC(0.1)).clip_()
    assert p.grad[0].double().norm().item() == pytest.approx(0.1 * 0.5 * 1000**0.5, rel=4e-3)
    assert (p.grad[1] == torch.tensor(0.001).bfloat16()).all()


def test_within_the_threshold_nothing_is_written():
    p = nn.Parameter(torch.ones(3, 4))
    p.grad = torch.full_like(p, 1e-4)
    version = p.grad._version
    report = distclip.GradClipper([("w", p)], policy=distclip.AGC(0.1)).clip_()
    assert not report.clipped and p.grad._version == version


def test_complex_weights_and_sparse_gradients():
    p = nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))
    p.grad = torch.full_like(p, 100j)
    report = distclip.GradClipper([("w", p)], policy=distclip.AGC(0.1)).clip_()
    assert report.clipped and p.grad[0].norm().item() == pytest.approx(0.1 * 3**0.5, rel=1e-6)
    assert p.grad.real.abs().max() == 0 and report.norm_after.item() == pytest.approx(
        0.1 * 6**0.5, rel=1e-6
    )
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(
        distclip.GradientError,
        match=r"a sparse gradient of shape \(4, 2\) cannot be scaled by "
        r"units; exempt it by groups=",
    ):
        distclip.GradClipper(table, policy=distclip.AGC(0.1)).clip_()


def one_part_without_a_gradient():
    import torch.distributed as dist

    weight, grad = drawn("w weight", 4, 8) / 4, drawn("w grad", 4, 8) / 64
    grad[:, :2] = 0
    weight_part, grad_part = (
        distribute_tensor(t, mesh(4), [Shard(1)], src_data_rank=None) for t in (weight, grad)
    )
    p = nn.Parameter(weight_part)
    p.grad = None if dist.get_rank() == 0 else grad_part
    distclip.GradClipper([("w", p)], policy=distclip.AGC(0.05)).clip_()
    want = unitwise(weight, grad, 0.05)[0][:, 2 * dist.get_rank() : 2 * dist.get_rank() + 2]
    return p.grad is None or float((p.grad.to_local().double() - want).abs().max())


def test_a_unit_is_as_large_as_all_its_parts(ranks):
    first, *others = ranks.run(one_part_without_a_gradient)
    assert first is True and max(others) <= 1e-7
