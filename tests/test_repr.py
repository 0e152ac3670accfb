"""`print(clipper)`: one line of what it clips and how."""

import math

import pytest
import torch
from torch import nn

import distclip
from distclip.kernels import active
from distclip.testing import count_collectives, fully_shard
from late import judged_late
from parity.layouts import Pair, mesh
from precision.test_waiting import NoHostReads

KERNELS = active().split()[0]  # "native", or "torch" where there are none


def line(**options):
    return repr(distclip.GradClipper(nn.Linear(4, 3), **options))


def test_one_line_says_what_is_clipped_and_how():
    size = f"parameters=2, elements=15, ranks=1, kernels={KERNELS}"
    assert line(max_norm=1.0) == f"GradClipper(max_norm=1.0, norm_type=2.0, {size})"
    assert line(max_norm=math.inf, norm_type=1).startswith("GradClipper(max_norm=inf, norm_type=1,")
    policy = distclip.Normalize(2.0)
    assert line(policy=policy) == f"GradClipper(policy={policy!r}, norm_type=2.0, {size})"
    other = nn.Linear(4, 3, dtype=torch.complex64)
    assert str(distclip.GradClipper(other, 1.0)).endswith("kernels=torch)")


class InLines(distclip.FixedNorm):
    def __repr__(self):
        return f"InLines(\n  {self.max_norm}\n)"


def test_a_policy_of_several_lines_stays_one_line():
    assert line(policy=InLines(2.0)).startswith("GradClipper(policy=InLines( 2.0 ), norm_type")


def of_a_shard():
    model = Pair()
    whole = sum(p.numel() for p in model.parameters())
    for part in (model.first, model.second, model):
        fully_shard(part, mesh=mesh(4))
    clipper = judged_late(distclip.GradClipper(model, 1.0))
    with NoHostReads(), count_collectives() as seen:
        said = repr(clipper)
    here = sum(p.to_local().numel() for p in model.parameters())
    return said, seen.names, here, whole


def test_it_counts_this_ranks_part_and_sends_nothing(ranks):
    answers = ranks.run(of_a_shard)
    for said, names, here, _ in answers:
        assert names == []
        assert f"parameters=6, elements={here}, ranks=4" in said
    assert sum(here for _, _, here, _ in answers) == answers[0][3]
    assert len({said for said, *_ in answers}) > 1, "vacuous: shards are uneven"


def test_a_clipper_that_was_never_set_up_can_be_printed():
    assert repr(distclip.GradClipper.__new__(distclip.GradClipper)) == "GradClipper(not set up)"
    failed = []

    class Kept(distclip.GradClipper):
        def rebuild(self, params=None):
            failed.append(self)
            super().rebuild(params)

    with pytest.raises(distclip.ConfigError):
        Kept(nn.Linear(4, 3), -1.0)
    assert repr(failed[0]) == "Kept(max_norm=-1.0, norm_type=2.0, not set up)"


def test_kernels_that_are_missing_do_not_keep_it_from_being_printed(monkeypatch):
    clipper = distclip.GradClipper(nn.Linear(4, 3), 1.0)
    monkeypatch.setenv("DISTCLIP_KERNELS", "torch")
    assert repr(clipper).endswith("kernels=torch)")
    monkeypatch.setenv("DISTCLIP_KERNELS", "nonsense")
    assert repr(clipper).endswith("kernels=missing)")
