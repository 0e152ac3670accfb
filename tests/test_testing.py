"""What distclip.testing promises its users: failures are told with their rank, hangs end, and
collectives are counted."""

import os
import threading
import time
import warnings

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
        time.sleep(3600)


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
    pair.run(rank_and, 0)  # ranks are up and know this file
    with pytest.raises(AssertionError) as error:
        pair.run(wrong, timeout=5.0 if wrong is hangs else 300.0)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert pair.run(rank_and, 1) == [(0, 1), (1, 1)]


def of_its_own():
    """A backward pass, a variable of the environment, and a warning."""
    p = torch.nn.Parameter(torch.ones(3))
    (p * (dist.get_rank() + 2)).sum().backward()
    try:
        warnings.warn("told", UserWarning)
        told = None
    except UserWarning as warning:
        told = str(warning)
    return p.grad.tolist(), os.environ.get("DISTCLIP_TEST"), os.getcwd(), told


def test_ranks_are_as_forked_ones_and_may_start_after_a_backward_pass(monkeypatch, tmp_path):
    """torch refuses to run one in a child that was forked after it: CUDA builds do so without a
    device too."""
    torch.ones(3, requires_grad=True).sum().backward()
    monkeypatch.setenv("DISTCLIP_TEST", "set late")
    monkeypatch.chdir(tmp_path)
    with World(2) as world:
        rows = world.run(of_its_own)
    assert rows == [([r + 2.0] * 3, "set late", str(tmp_path), "told") for r in range(2)], (
        "warnings are errors here"
    )


def not_to_be_found():
    raise NotImplementedError


def test_a_function_that_ranks_cannot_import_is_told(pair, monkeypatch):
    monkeypatch.setattr(not_to_be_found, "__qualname__", "other")
    monkeypatch.setitem(globals(), "other", not_to_be_found)
    with pytest.raises(
        AssertionError, match=r"(?s)ranks \[0, 1\]: Traceback.*AttributeError.*other"
    ):
        pair.run(not_to_be_found)


def total(group, x):
    t = torch.tensor([float(x + group.rank())])
    dist.all_reduce(t, group=group)
    return t.item(), group.calls


def test_threads_are_ranks():
    assert run_threads(3, total, 5) == [(18.0, 1)] * 3


def missing(group):
    if group.rank() != 1:
        total(group, 0)


def stuck(group):
    """The others have long ended."""
    if group.rank() == 1:
        threading.Event().wait()


def stuck_after_a_collective(group):
    total(group, 0)
    stuck(group)


def failing(group):
    if group.rank() == 1:
        raise KeyError("mine")
    total(group, 0)


@pytest.mark.parametrize("wrong", [missing, stuck, stuck_after_a_collective])
def test_a_thread_that_never_comes_or_never_ends(wrong):
    with pytest.raises(RuntimeError, match=r"^not all of 2 threads came within 0\.3 s$"):
        run_threads(2, wrong, timeout_s=0.3)


def test_a_thread_that_fails_is_told_and_ends_the_others():
    with pytest.raises(KeyError, match="mine"):
        run_threads(3, failing, timeout_s=3600)


def counted():
    with count_collectives() as seen:
        t = torch.ones(2)
        dist.all_reduce(t)
        all_reduce(t, "sum", mesh(4)).wait()
        DTensor.from_local(t, mesh(4), [Partial()]).redistribute(
            placements=[Replicate()]
        ).to_local()
        dist.barrier()
    return seen.names


def test_native_functional_and_dtensor_collectives_are_counted(ranks):
    assert ranks.run(counted) == [["allreduce_", "all_reduce", "all_reduce", "barrier"]] * 4
