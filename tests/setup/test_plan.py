"""The agreement on threads as ranks: 128 of them, its work, and what it finds wrong."""

import time
from statistics import median

import torch

from distclip.exchange.channel import Channel
from distclip.records import ParamHolding, ParamPiece
from distclip.setup.inventory import exchange_tables
from distclip.setup.plan import make_plan
from distclip.setup.replicas import drift_pattern, find_replicas
from distclip.testing import run_threads

CPU = torch.device("cpu")


def channel_of(group):
    return Channel(group, range(group.size()), group.rank())


def sharded(rank, size, count):
    """FSDP-like: `count` parameters in `size` parts, and as many biases copied everywhere."""
    part = ParamHolding("Shard(0)", f"{rank}/{size}", ("mesh",))
    whole = ParamHolding("whole", "whole", ("all",))
    pieces = [
        ParamPiece(f"w{i}", f"w{i}", part, (size, 3), 3 * size, (1, 3), None)
        for i in range(count // 2)
    ]
    return pieces + [
        ParamPiece(f"b{i}", f"b{i}", whole, (5,), 5, (5,), None) for i in range(count // 2)
    ]


def plan_of(group, count):
    channel = channel_of(group)
    pieces = sharded(channel.rank, channel.size, count)
    plan = make_plan(channel, pieces, ["all"] * count, {}, 2.0, CPU)
    return plan, group.calls


def test_shares_and_table():
    for plan, calls in run_threads(4, plan_of, 10):
        assert [s.num_replicas for s in plan.shares] == [1] * 5 + [4] * 5
        assert [(r.parameters, r.elements, r.copies) for r in plan.rows] == [(5, 60, 1), (5, 25, 4)]
        assert calls == 3


def work_of(group, count):
    channel = channel_of(group)
    pieces = sharded(channel.rank, channel.size, count)
    tables = exchange_tables(channel, pieces, ["all"] * count, [""] * count, [], CPU)
    start = time.thread_time()
    find_replicas(tables, channel.rank, pieces)
    return time.thread_time() - start


def test_agreement_of_128_ranks_is_less_than_a_second_of_work_each():
    """Of the processor's time, and for most: one thread may be charged for what others on the
    machine did to it."""
    seconds = run_threads(128, work_of, 1000)
    assert median(seconds) < 1.0, sorted(seconds)


def private_names(group):
    channel = channel_of(group)
    own = ParamHolding("whole", "whole", ("all ranks",))
    pieces = [
        ParamPiece(name, name, own, (4,), 4, (4,), None)
        for name in ("gate", f"expert{channel.rank}")
    ]
    return make_plan(channel, pieces, [piece.name for piece in pieces], {}, 2.0, CPU)


def test_names_that_other_ranks_lack():
    plans = run_threads(8, private_names)
    assert len({plan.groups for plan in plans}) == 1
    assert plans[0].groups == ("expert0", *(f"expert{r}" for r in range(1, 8)), "gate")
    assert [s.num_replicas for s in plans[3].shares] == [8, 1]


def test_weights_sum_to_zero_and_none_is_small():
    for holders in (2, 3, 4, 5, 8, 33, 1024):
        weights = drift_pattern(holders)
        assert abs(sum(weights)) < 1e-12 * holders
        assert 0.25 <= min(map(abs, weights)) <= max(map(abs, weights)) == 1.0
