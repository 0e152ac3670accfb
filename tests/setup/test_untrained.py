"""A clipper of which no rank trains anything says so once, on all ranks; what is unfrozen later is
clipped."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip.testing import fully_shard
from parity.layouts import Pair, mesh, pair_grads, trained
from parity.oracle import total_norm

TEXT = (
    "GradClipper: of its {} none is trainable on any rank (requires_grad is False), so there is "
    "nothing to clip. If that is a mistake, unfreeze what is to be trained; if it will be unfrozen "
    "later there is nothing to do, it is clipped from then on"
)


def told(build):
    """What building a clipper tells: (class, text, file); and the clipper."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        clipper = build()
    return [(w.category, str(w.message), w.filename) for w in seen], clipper


def frozen_at_first():
    model = Pair().requires_grad_(False)
    for part in (model.first, model.second, model):
        fully_shard(part, mesh=mesh(4))
    said, clipper = told(lambda: distclip.GradClipper(model, 1.0))
    again, _ = told(clipper.rebuild)
    model.requires_grad_(True)
    trained(model)
    report = clipper.clip_()
    none, _ = told(clipper.rebuild)
    return said, again, none, report.total_norm.item(), report.clipped.item()


def test_all_ranks_are_told_and_what_is_unfrozen_is_clipped(ranks):
    for said, again, none, norm, clipped in ranks.run(frozen_at_first):
        assert said == again == [(RuntimeWarning, TEXT.format("6 parameters"), __file__)]
        assert none == [] and clipped
        assert norm == pytest.approx(total_norm(pair_grads()), rel=1e-6)


def a_stage_that_trains():
    """Each rank has a stage, and one of them is trained."""
    rank = dist.get_rank()
    stage = nn.ModuleDict({f"stage{rank}": nn.Linear(3, 2)}).requires_grad_(rank == 2)
    said, _ = told(lambda: distclip.GradClipper(stage, 1.0))
    stage.requires_grad_(False)
    return said, told(lambda: distclip.GradClipper(stage, 1.0))[0]


def test_a_rank_that_trains_is_enough(ranks):
    for one, none in ranks.run(a_stage_that_trains):
        assert one == []
        assert none == [(RuntimeWarning, TEXT.format("8 parameters"), __file__)]


def test_gradients_that_are_given_are_trained():
    p = torch.zeros(2)
    assert not p.requires_grad
    assert len(told(lambda: distclip.GradClipper([("w", p)], 1.0))[0]) == 1
    p.grad = torch.tensor([3.0, 4.0])
    assert told(lambda: distclip.GradClipper([("w", p)], 1.0))[0] == []
    elsewhere = {id(p): p.grad}
    p.grad = None
    build = lambda: distclip.GradClipper([("w", p)], 1.0, grad_of=lambda q: elsewhere[id(q)])  # noqa: E731
    said, clipper = told(build)
    assert said == [] and clipper.measure().total_norm == 5
