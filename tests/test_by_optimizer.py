"""Groups by the class of the optimizer that holds a parameter."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip.testing import count_collectives, fully_shard
from parity.layouts import Pair, mesh, pair_grads, trained
from parity.oracle import total_norm
from test_optimizers import WRAPPERS, pairs


class Muon(torch.optim.SGD):
    """Stands for torch's, which older releases do not have."""


def test_groups_bear_the_names_of_classes():
    params = pairs([3.0, 4.0], [6.0, 8.0], [0.0, 1.0])
    muon = Muon([params[0][1]], 0.1)
    adam = torch.optim.Adam([params[1][1]], 0.1)
    groups = distclip.by_optimizer(
        {Muon: distclip.Exempt(), torch.optim.Adam: distclip.FixedNorm(5.0)}, muon, adam
    )
    report = distclip.GradClipper(params, 0.5, groups=groups).clip_()
    assert report.groups == ("Adam", "Muon", "rest")
    assert report.group_norms.tolist() == [10, 5, 1]
    assert report.coefs.tolist() == [0.5, 1, 0.5]
    assert report.total_norm.item() == pytest.approx(math.hypot(10, 1)), "Muon's do not count"
    assert [p.grad.tolist() for _, p in params] == [[3, 4], [3, 4], [0, 0.5]]


def test_the_nearest_class_counts():
    """A subclass is its base only where the table does not name it."""

    class Own(Muon):
        pass

    params = pairs([3.0], [4.0], [5.0])
    optimizers = [
        kind([p], 0.1) for kind, (_, p) in zip((Own, Muon, torch.optim.SGD), params, strict=True)
    ]
    table = {torch.optim.SGD: 1.0, Muon: 2.0}
    for order in (table, dict(reversed(table.items()))):
        groups = distclip.by_optimizer(order, *optimizers)
        report = distclip.GradClipper(params, math.inf, groups=groups).measure()
        assert report.groups == ("Muon", "SGD")
        assert report.group_norms.tolist() == pytest.approx([math.hypot(3, 4), 5])


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_looked_through(name):
    params = pairs([3.0, 4.0], [6.0, 8.0])
    inner = Muon([params[0][1]], 0.1)
    wrapper = WRAPPERS[name](inner)
    groups = distclip.by_optimizer({Muon: distclip.Exempt(), type(wrapper): 1.0}, wrapper)
    with pytest.raises(distclip.ConfigError, match=f"is a {type(wrapper).__name__} and holds"):
        distclip.GradClipper(params, 5.0, groups=groups)
    groups = distclip.by_optimizer({Muon: distclip.Exempt()}, wrapper)
    report = distclip.GradClipper(params, 5.0, groups=groups).clip_()
    assert report.groups == ("Muon", "rest") and report.coefs.tolist() == [1, 0.5]
    if name != "hidden":  # it names no parameters of its own
        groups = distclip.by_optimizer({type(wrapper): distclip.Exempt()}, wrapper)
        report = distclip.GradClipper(params, 5.0, groups=groups).clip_()
        assert report.groups == (type(wrapper).__name__, "rest")


def test_classes_of_one_name_are_told_apart():
    own = type("SGD", (Muon,), {"__module__": "mine"})
    params = pairs([3.0], [4.0])
    optimizers = torch.optim.SGD([params[0][1]], 0.1), own([params[1][1]], 0.1)
    groups = distclip.by_optimizer({torch.optim.SGD: 1.0, own: 2.0}, *optimizers)
    report = distclip.GradClipper(params, 1.0, groups=groups).clip_()
    assert report.groups == ("mine.SGD", "torch.optim.sgd.SGD")
    assert report.threshold.tolist() == [2, 1]


ONE = nn.Parameter(torch.zeros(1))
TWINS = [type("Twin", (Muon,), {"__module__": "mine"}) for _ in range(2)]
REST = type("rest", (Muon,), {})
REFUSED = {
    "nothing": (lambda: distclip.by_optimizer({}, Muon([ONE], 0.1)), "the table is empty"),
    "a list": (lambda: distclip.by_optimizer([Muon], 1.0), "the table is a list"),
    "a name": (lambda: distclip.by_optimizer({"Muon": 1.0}), "'Muon' is no class"),
    "no optimizer": (lambda: distclip.by_optimizer({Muon: 1.0}), "no optimizer was given"),
    "a class": (lambda: distclip.by_optimizer({Muon: 1.0}, Muon), "is no optimizer; pass the"),
    "one name": (
        lambda: distclip.by_optimizer(dict.fromkeys(TWINS, 1.0), *(t([ONE], 0.1) for t in TWINS)),
        "mine.Twin is the name of another group",
    ),
    "the rest": (lambda: distclip.by_optimizer({REST: 1.0}, REST([ONE], 0.1)), "rest is the name"),
    "a module": (lambda: distclip.by_optimizer({Muon: 1.0}, nn.Linear(1, 1)), "is no optimizer"),
}


@pytest.mark.parametrize("make, text", REFUSED.values(), ids=REFUSED)
def test_refused(make, text):
    with pytest.raises(distclip.ConfigError, match=f"by_optimizer: .*{text}"):
        make()


def split_between_optimizers():
    """One optimizer for each half of a sharded model; the second also for a class of no use."""
    model = Pair()
    for part in (model.first, model.second, model):
        fully_shard(part, mesh=mesh(4))
    optimizers = Muon(model.first.parameters(), 0.1), torch.optim.AdamW(model.second.parameters())
    table = {Muon: distclip.Exempt(), torch.optim.AdamW: 2.0}
    clipper = distclip.GradClipper(
        trained(model), 1.0, groups=distclip.by_optimizer(table, *optimizers)
    )
    with count_collectives() as seen:
        report = clipper.step(*optimizers)
    try:
        groups = distclip.by_optimizer({**table, torch.optim.Adagrad: 1.0}, *optimizers)
        distclip.GradClipper(model, 1.0, groups=groups)
        text = ""
    except distclip.ConfigError as error:
        text = str(error)
    return report.groups, report.group_norms.tolist(), report.coefs.tolist(), seen.names, text


def test_a_sharded_model_under_two_optimizers(ranks):
    first, second = (total_norm(grads) for grads in (pair_grads()[:3], pair_grads()[3:]))
    assert first > 2 and second > 2, "vacuous"
    answers = ranks.run(split_between_optimizers)
    assert answers == answers[:1] * 4
    groups, norms, coefs, names, text = answers[0]
    assert groups == ("AdamW", "Muon") and norms == pytest.approx([second, first], rel=1e-6)
    assert coefs == pytest.approx([2 / second, 1], rel=1e-6)
    assert names == ["allreduce_"]
    assert text == (
        "by_optimizer: no optimizer that was passed is a Adagrad and holds one of the clipper's "
        "parameters, on any rank; pass it after the table, by_optimizer({...}, optimizer), built "
        "after the model was wrapped and sharded, or leave Adagrad out"
    )


def stage_by_stage():
    """Each rank has a stage, and an optimizer of its own class."""
    rank = dist.get_rank()
    params = [(f"stage{rank}", p) for _, p in pairs([1.0 + rank])]
    optimizer = (Muon if rank < 3 else torch.optim.Adagrad)([params[0][1]], 0.1)
    groups = distclip.by_optimizer({Muon: math.inf, torch.optim.Adagrad: 2.0}, optimizer)
    report = distclip.GradClipper(params, 1.0, groups=groups).clip_()
    return report.groups, report.group_norms.tolist(), report.coefs.tolist()


def test_a_class_may_be_missing_on_some_ranks(ranks):
    for groups, norms, coefs in ranks.run(stage_by_stage):
        assert groups == ("Adagrad", "Muon") and coefs == [0.5, 1]
        assert norms == pytest.approx([4, math.sqrt(1 + 4 + 9)])
