"""skip, raise and propagate mean the same in every strategy; NaN on any one rank is seen by all,
whatever p is."""

import math

import pytest
import torch
import torch.distributed as dist

import distclip
import skips
from precision.jobs import STRATEGIES, Job, Poison


@skips.told(0)
def spoilt(strategy, mode, value=math.nan):
    job = Job(strategy, "fp32", {"on_nonfinite": mode})
    job.backward(0)
    job.step()
    before, text, report = job.state(), None, None
    job.backward(1, Poison("grad", 1, value))
    try:
        report = job.step()
    except distclip.NonFiniteError as error:
        text = str(error)
    said = report and report.to_dict()
    return (
        text,
        said
        and (said["skipped"], said["clipped"], said["nonfinite"], said["coefs"], said["culprits"]),
        job.state() == before,
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_skip(ranks, strategy):
    rows = ranks.run(spoilt, strategy, "skip")
    for text, (skipped, clipped, nonfinite, coefs, culprits), stood in rows:
        assert (
            text is None and stood and skipped and not clipped and nonfinite == 1 and coefs == [0]
        )
        assert [(c["rank"], c["kind"]) for c in culprits] == [(1, "NaN")]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_raise(ranks, strategy):
    rows = ranks.run(spoilt, strategy, "raise", math.inf)
    assert all(stood for *_, stood in rows) and len({text for text, *_ in rows}) == 1
    name = rows[0][0].split(": ")[2].split(" ")[0]
    assert name in ("0.weight", "0.bias", "2.weight", "2.bias")
    assert rows[0][0] == (
        f"step 2: 1 gradient tensor is not finite: {name} on rank 1: inf. Look at the loss, the "
        f"data and the learning rate of that step; "
        "on_nonfinite='skip' leaves such steps out"
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_propagate(ranks, strategy):
    for rank, (text, (skipped, clipped, nonfinite, coefs, _), stood) in enumerate(
        ranks.run(spoilt, strategy, "propagate")
    ):
        assert text is None and not skipped and not clipped and nonfinite == 1 and coefs == [1]
        assert not stood, f"rank {rank} did not step"


@skips.told()
def nan_on_each_rank(p):
    said = []
    job = Job("ddp", "fp32", {"norm_type": p})
    for rank in range(4):
        job.backward(rank, Poison("grad", rank, math.nan))
        measured = job.clipper.measure()
        said.append(
            (bool(measured.total_norm.isfinite()), bool(measured.skipped), bool(job.step().skipped))
        )
    return said


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, math.inf])
def test_nan_on_any_rank(ranks, p):
    assert ranks.run(nan_on_each_rank, p) == [[(False, False, True)] * 4] * 4


@skips.told()
def many_culprits():
    names = [f"w{i}" for i in range(9)]
    params = []
    for name in names:
        p = torch.nn.Parameter(torch.zeros(2))
        p.grad = torch.full((2,), math.inf if dist.get_rank() else 1.0)
        params.append((name, p))
    clipper = distclip.GradClipper(params, 1.0, replicated_over={"*": distclip.PRIVATE})
    first = clipper.measure(), clipper.clip_()
    for _, p in params:
        p.grad = torch.full((2,), math.inf)
    return (
        len(first[0].culprits),
        first[1].culprits,
        first[1].nonfinite.item(),
        clipper.clip_().culprits,
    )


def test_at_most_ten_culprits_in_turn_from_each_rank_on_the_first_step_of_a_streak(ranks):
    for measured, culprits, nonfinite, later in ranks.run(many_culprits):
        assert measured == 0 and nonfinite == 27 and later == ()
        assert [c.rank for c in culprits] == [1, 2, 3] * 3 + [1] and len(set(culprits)) == 10
