"""Norms of the experts in fused tensors, cut along their first dimension, in every layout, beside a
float64 oracle of one process."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from distclip.testing import count_collectives, fully_shard
from parity.layouts import LocalPull, Pull, drawn, given, mesh, trained
from parity.oracle import total_norm

INF = math.inf
# experts first; 5 and 6 divide by neither 4 nor, of 5, 2
SHAPES = {"w_in": (6, 4, 3), "w_out": (6, 3, 8), "bias": (6,)}
OTHER = {"weight": (5, 4)}


def pull(name, shape):
    """The drawn gradient, larger from expert to expert, so that no two norms are equal."""
    grown = torch.arange(1.0, shape[0] + 1).view(-1, *[1] * (len(shape) - 1))
    return drawn(f"experts.{name}", *shape) * grown


def shapes_of(count):
    return {name: (count, *shape[1:]) for name, shape in SHAPES.items()}


class Experts(nn.Module):
    """Its parameters are `experts.*` and `router.weight`."""

    def __init__(self, count=6, kind=Pull):
        super().__init__()
        self.experts, self.router = kind("experts.", shapes_of(count)), Pull("router.", OTHER)
        self.experts.pulls = {name: pull(name, shape) for name, shape in shapes_of(count).items()}

    def forward(self, x):
        return self.experts(x) + self.router(x)


def grads(count=6):
    """[of the experts' tensors], [of the others]."""
    own = [pull(name, shape) for name, shape in shapes_of(count).items()]
    return own, [drawn("router.weight", *OTHER["weight"])]


def placed(on, place):
    """Pairs, each expert tensor placed by `place` of its number of dimensions."""
    named = [given("router.weight", *OTHER["weight"], on=on, place=[Replicate()] * on.ndim)]
    for name, shape in SHAPES.items():
        grad, zero = (
            distribute_tensor(tensor, on, place(len(shape)), src_data_rank=None)
            for tensor in (pull(name, shape), torch.zeros(shape))
        )
        named.append((f"experts.{name}", nn.Parameter(zero)))
        named[-1][1].grad = grad
    return named


def whole(wrap=lambda model: model):
    """Every rank computes all."""
    model = wrap(Experts())
    model(torch.tensor(1.0)).backward()
    return model


def across(p):
    """The dimension behind the first that four ranks divide."""
    return Shard(next((dim for dim in range(1, p.ndim) if p.shape[dim] % 4 == 0), 0))


def sharded(place=None):
    model = Experts()
    fully_shard(model.experts, mesh=mesh(4), shard_placement_fn=place)
    fully_shard(model, mesh=mesh(4))
    return trained(model)


def expert_parallel_and_sharded():
    """Experts over the inner ranks, each rank's part cut further over the outer ones: five experts
    are 3 and 2, and then 2, 1, 1 and 1."""
    grid, model = mesh(2, 2), Experts(5, LocalPull)
    for name, p in list(model.experts.named_parameters()):
        local = distribute_tensor(p.detach(), grid["inner"], [Shard(0)], src_data_rank=None)
        setattr(model.experts, name, nn.Parameter(local))
        chunks = model.experts.pulls[name].chunk(2)
        model.experts.pulls[name] = chunks[grid["inner"].get_local_rank()]
    fully_shard(model.experts, mesh=grid["outer"])
    fully_shard(model.router, mesh=mesh(4))
    for part in (model.experts, model.router):
        part(torch.tensor(1.0)).backward()
    return model


LAYOUTS = {
    "plain": whole,
    "ddp": lambda: whole(DDP),
    "fsdp2, uneven": sharded,
    "fsdp2, cut experts": lambda: sharded(across),
    "tensor parallel": lambda: placed(mesh(4), lambda ndim: [Shard(min(1, ndim - 1))]),
    "tensor parallel, last": lambda: placed(mesh(4), lambda ndim: [Shard(-1)]),
    "expert parallel, uneven": lambda: placed(mesh(4), lambda ndim: [Shard(0)]),
    "expert and tensor parallel": lambda: placed(
        mesh(2, 2), lambda ndim: [Shard(0), Shard(1) if ndim > 1 else Replicate()]
    ),
}


def norms_of(name, p):
    return watched_norms(LAYOUTS[name](), p)


def watched_norms(params, p, pattern="experts.*", **options):
    watch = distclip.Watch(distclip.per_expert(pattern))
    clipper = distclip.GradClipper(params, INF, norm_type=p, watch=watch, **options)
    with count_collectives() as seen:
        report = clipper.clip_()
    unwatched = distclip.GradClipper(params, INF, norm_type=p, **options).clip_()
    named = dict(zip(report.layers, report.layer_norms.tolist(), strict=True))
    return named, report.total_norm.item(), unwatched.total_norm.item(), seen.names


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, INF])
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_expert_has_its_norm(ranks, name, p):
    answers = ranks.run(norms_of, name, p)
    assert answers == answers[:1] * 4, "the same bits"
    compare(answers[0], *grads(), p)


def compare(answer, experts, others, p):
    layers, total, unwatched, names = answer
    count = len(experts[0])
    want = {f"experts[{e}]": total_norm([g[e] for g in experts], p) for e in range(count)}
    assert len(set(want.values())) == count, "vacuous"
    want["rest"] = total_norm(others, p)
    assert list(layers) == list(want) and layers == pytest.approx(want, rel=1e-6)
    assert total == pytest.approx(unwatched, rel=1e-6) and names == ["allreduce_"]
    mine = [layers[name] for name in want if name != "rest"]
    together = max(mine) if p == INF else sum(norm**p for norm in mine) ** (1 / p)
    assert together == pytest.approx(total_norm(experts, p), rel=1e-6)


def norms_over_expert_parallel_shards():
    return watched_norms(expert_parallel_and_sharded(), 2.0)


def test_expert_parallel_parts_that_fsdp2_cuts_further(ranks):
    answers = ranks.run(norms_over_expert_parallel_shards)
    assert answers == answers[:1] * 4
    layers = answers[0][0]
    experts, others = grads(5)
    norms = [total_norm([g[e] for g in experts]) for e in range(5)]
    assert [layers[f"experts[{e}]"] for e in range(5)] == pytest.approx(norms, rel=1e-6)
    assert layers["rest"] == pytest.approx(total_norm(others), rel=1e-6)


def norms_of_private_experts():
    """Twelve experts, three on each rank, in tensors of one name."""
    rank = dist.get_rank()
    params = [
        ("moe.w", given(f"w{rank}", 3, 4, 2)[1]),
        ("moe.v", given(f"v{rank}", 3, 5)[1]),
        given("dense", 5),
    ]
    return watched_norms(params, 2.0, "moe.*", replicated_over={"moe.*": distclip.PRIVATE})


def test_experts_private_to_their_ranks_are_numbered_on(ranks):
    answers = ranks.run(norms_of_private_experts)
    assert answers == answers[:1] * 4
    layers = answers[0][0]
    want = [
        total_norm([drawn(f"w{rank}", 3, 4, 2)[e], drawn(f"v{rank}", 3, 5)[e]])
        for rank in range(4)
        for e in range(3)
    ]
    assert list(layers) == [*(f"moe[{i:02d}]" for i in range(12)), "rest"]
    assert list(layers.values()) == pytest.approx([*want, total_norm([drawn("dense", 5)])])


def norms_of_stages():
    """The experts stand in one stage alone; other ranks learn how many there are."""
    rank = dist.get_rank()
    named = [given(f"stage{rank}.weight", 4)]
    if rank == 2:
        named.append(given("stage2.experts.w", 3, 4))
    return watched_norms(named, 2.0, "*.experts.*")


def test_a_rank_without_experts_knows_their_number(ranks):
    answers = ranks.run(norms_of_stages)
    assert answers == answers[:1] * 4
    want = [total_norm([row]) for row in drawn("stage2.experts.w", 3, 4)]
    layers = answers[0][0]
    assert [layers[f"stage2.experts[{e}]"] for e in range(3)] == pytest.approx(want)


def test_the_other_parameters_may_be_grouped_too():
    model = whole()
    watch = distclip.Watch(distclip.per_expert("experts.w_*", distclip.per_layer()))
    clipper = distclip.GradClipper(model, INF, watch=watch)
    layers = clipper.plan.layers
    assert layers == ("experts", *(f"experts[{e}]" for e in range(6)), "router")
    report = clipper.clip_()
    assert report.layer_norms[0].item() == pytest.approx(total_norm([grads()[0][2]]))
    model.experts.w_in.grad = None
    report = clipper.clip_()
    want = [total_norm([g]) for g in grads()[0][1]]
    assert report.layer_norms.tolist()[1:7] == pytest.approx(want)
    of_parameters = clipper.measure(of="param").layer_norms.tolist()[1:7]
    assert of_parameters == pytest.approx([math.sqrt(4 * 3 + 3 * 8)] * 6)


def test_factors_reach_the_experts():
    model = whole()
    watch = distclip.Watch(distclip.per_expert("experts.*"))
    clipper = distclip.GradClipper(model, INF, watch=watch)
    plain = clipper.measure().layer_norms
    half = clipper.clip_(grad_scale=0.5).layer_norms
    assert half.tolist() == pytest.approx((plain / 2).tolist()) and plain.min() > 0


def test_a_gradient_that_was_unscaled_before_is_not_unscaled_twice():
    model = whole()
    parts = {"experts": model.experts, "router": model.router}
    optimizers = [torch.optim.SGD(part.parameters(), 0.0) for part in parts.values()]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    watch = distclip.Watch(distclip.per_expert("experts.*", distclip.per_layer()))
    clipper = distclip.GradClipper(model, INF, watch=watch)
    want = clipper.measure().layer_norms.tolist()
    for p in model.parameters():
        p.grad *= 8
    scaler.unscale_(optimizers[1])
    report = clipper.step(*optimizers, scaler=scaler)
    assert report.layer_norms.tolist() == pytest.approx(want) and min(want) > 0


def placed_otherwise(what):
    """Gradients that lie otherwise than their parameters: of a tensor that is cut, and of one
    beside them."""
    _, *experts = placed(mesh(4), lambda ndim: [Shard(0)])
    router = given("router.weight", *OTHER["weight"], on=mesh(4), place=[Shard(0)])
    named = [router, *experts]
    p = dict(named)["router.weight" if what == "beside" else "experts.w_in"]
    p.grad = p.grad.redistribute(placements=[Replicate()])
    try:
        return watched_norms(named, 2.0)[0]
    except distclip.GradientError as error:
        return str(error)


@pytest.mark.parametrize("what", ["beside", "cut"])
def test_gradients_placed_otherwise_than_their_parameters(ranks, what):
    for said in ranks.run(placed_otherwise, what):
        if what == "beside":
            assert said["rest"] == pytest.approx(total_norm(grads()[1]), rel=1e-6)
            assert said["experts[3]"] == pytest.approx(total_norm([g[3] for g in grads()[0]]))
        else:
            assert "the gradient of experts.w_in is placed otherwise than its parameter" in said


def test_an_inf_shows_in_its_expert():
    model = whole()
    model.experts.w_in.grad[4, 0, 0] = INF
    watch = distclip.Watch(distclip.per_expert("experts.*"))
    report = distclip.GradClipper(model, INF, watch=watch).measure()
    named = dict(zip(report.layers, report.layer_norms.tolist(), strict=True))
    assert [name for name, norm in named.items() if not math.isfinite(norm)] == ["experts[4]"]


def sparse():
    model = nn.ModuleDict({"experts": nn.Embedding(6, 3, sparse=True)})
    model["experts"](torch.tensor([1, 2])).sum().backward()
    watch = distclip.Watch(distclip.per_expert("experts.*"))
    distclip.GradClipper(model, 1.0, watch=watch).clip_()


def unequal():
    params = [("moe.w", nn.Parameter(torch.ones(4, 2))), ("moe.v", nn.Parameter(torch.ones(3, 2)))]
    distclip.GradClipper(params, 1.0, watch=distclip.Watch(distclip.per_expert("moe.*")))


REFUSED = {
    "clipping": (
        lambda: distclip.GradClipper(Experts(), 1.0, groups=distclip.per_expert("experts.*")),
        r"groups=per_expert\(\.\.\.\): all of a gradient tensor .*; watch them, watch=",
    ),
    "unequal numbers": (unequal, "some tensors of moe have 3 experts .*, others 4"),
    "sparse": (sparse, "the gradient of experts.weight is sparse, and per_expert cuts it"),
    "no match": (
        lambda: distclip.GradClipper(
            Experts(), 1.0, watch=distclip.Watch(distclip.per_expert("moe.*"))
        ),
        r"'moe\.\*' matches no parameter on any rank",
    ),
    "others": (
        lambda: distclip.per_expert("moe.*", distclip.per_layer),
        "per_expert: others=.*; pass a grouping",
    ),
}


@pytest.mark.parametrize("make, text", REFUSED.values(), ids=REFUSED)
def test_refused(make, text):
    with pytest.raises(distclip.DistclipError, match=text):
        make()


def under_fsdp1():
    try:
        model = FSDP1(Experts(), use_orig_params=True, device_id=torch.device("cpu"))
        distclip.GradClipper(model, 1.0, watch=distclip.Watch(distclip.per_expert("experts.*")))
    except distclip.PlacementError as error:
        return str(error)


def test_fsdp1_is_refused(ranks):
    for text in ranks.run(under_fsdp1):
        assert "FSDP1 cuts them anywhere: use fully_shard" in text
