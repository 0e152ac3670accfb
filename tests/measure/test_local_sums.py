"""What goes wrong while this rank measures travels in the message and is raised afterwards."""

import traceback

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from parity.layouts import given


class Buggy(distclip.FixedNorm):
    """Fails while it looks at the gradients, on the last rank alone."""

    num_stats = 1

    def local_stats(self, own):
        if not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1:
            self.look_into_it()
        return torch.zeros(own.groups, 1, dtype=torch.float64)

    def look_into_it(self):
        raise KeyError("window")


def test_an_exception_keeps_its_traceback():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 5.0)
    clipper = distclip.GradClipper([("p", p)], policy=Buggy(1.0))
    with pytest.raises(distclip.GradientError, match="step 1: rank 0: KeyError: 'window'") as error:
        clipper.clip_()
    cause = error.value.__cause__
    assert isinstance(cause, KeyError)
    assert traceback.extract_tb(cause.__traceback__)[-1].name == "look_into_it"
    assert p.grad.tolist() == [5.0] * 3


def refused():
    name, p = given("w", 40)
    before = p.grad.clone()
    clipper = distclip.GradClipper([(name, p)], policy=Buggy(0.1))
    with pytest.raises(distclip.GradientError) as error:
        clipper.clip_()
    cause = error.value.__cause__
    return str(error.value), type(cause).__name__, torch.equal(p.grad, before)


def test_it_is_raised_on_all_ranks_from_what_one_of_them_met(ranks):
    rows = ranks.run(refused)
    assert {text for text, *_ in rows} == {"step 1: rank 3: KeyError: 'window'"}
    assert [cause for _, cause, _ in rows] == ["NoneType"] * 3 + ["KeyError"]
    assert all(untouched for *_, untouched in rows)
