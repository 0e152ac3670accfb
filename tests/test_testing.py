"""What distclip.testing promises its users: failures are told with their rank, hangs end, and collectives are counted."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.tensor import DTensor, Partial, Replicate

from distclip.testing import World, count_collectives, run_threads
from parity.layouts import mesh


@pytest.fixture(scope="module")
def pair():
    with World(2) as world:
        yield world


def rank_and(x):
    return dist.get_rank(), x


def fails():
    if dist.get_rank() == 1:
        raise ValueError("one and a half")
    return 0


def dies():
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def hangs():
    if dist.get_rank() == 1:
        time.sleep(30)


def test_answers_come_by_rank(pair):
    assert pair.run(rank_and, "x") == [(0, "x"), (1, "x")]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (fails, ["ranks [1]: Traceback", "ValueError: one and a half"]),
        (dies, ["ranks [1]: the process died, exit code 3"]),
        (hangs, ["ranks [1]: hangs:", "in hangs"]),
    ],
)
def test_failures_name_their_ranks_and_the_pool_goes_on(pair, wrong, words):
    began = time.monotonic()
    with pytest.raises(AssertionError) as error:
        pair.run(wrong, timeout=3.0)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert time.monotonic() - began < 20
    assert pair.run(rank_and, 1) == [(0, 1), (1, 1)]


def total(group, x):
    t = torch.tensor([float(x + group.rank())])
    dist.all_reduce(t, group=group)
    return t.item(), group.calls


def test_threads_are_ranks():
    assert run_threads(3, total, 5) == [(18.0, 1)] * 3


def missing(group):
    if group.rank() != 1:
        total(group, 0)


def failing(group):
    if group.rank() == 1:
        raise KeyError("mine")
    total(group, 0)


def test_a_thread_that_never_comes_or_fails():
    with pytest.raises(RuntimeError, match=r"not all of 2 threads came within 0\.3 s"):
        run_threads(2, missing, timeout_s=0.3)
    with pytest.raises(KeyError, match="mine"):
        run_threads(2, failing)


def counted():
    with count_collectives() as seen:
        t = torch.ones(2)
        dist.all_reduce(t)
        all_reduce(t, "sum", mesh(4)).wait()
        DTensor.from_local(t, mesh(4), [Partial()]).redistribute(placements=[Replicate()]).to_local()
        dist.barrier()
    return seen.names


def test_native_functional_and_dtensor_collectives_are_counted(ranks):
    assert ranks.run(counted) == [["allreduce_", "all_reduce", "all_reduce", "barrier"]] * 4
