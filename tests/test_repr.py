"""`print(clipper)`: one line of what it clips and how."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip.kernels import active
from distclip.testing import count_collectives, fully_shard
from late import judged_late
from parity.layouts import Pair, mesh
from precision.test_waiting import NoHostReads
from setup.test_refusals import refusal

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


class Unprintable(distclip.FixedNorm):
    """Of a policy that has lost what it shows."""

    fails = True

    def __repr__(self):
        if self.fails:
            raise OSError("no name here")
        return f"Unprintable({self.max_norm})"


def test_a_clipper_can_be_printed_whatever_was_passed(monkeypatch, caplog):
    class Kept(distclip.GradClipper):
        def rebuild(self, params=None):
            failed.append(self)
            super().rebuild(params)

    failed = []
    for wrong in ({"policy": Unprintable(1.0)}, {"max_norm": Unprintable(1.0)}):
        with pytest.raises((distclip.ConfigError, OSError)):
            Kept(nn.Linear(4, 3), **wrong)
    shown = "Unprintable(repr fails), norm_type=2.0, not set up)"
    assert list(map(repr, failed)) == [f"Kept(policy={shown}", f"Kept(max_norm={shown}"]

    monkeypatch.setattr(Unprintable, "fails", False)
    model, reports = nn.Linear(4, 3), []
    clipper = distclip.GradClipper(model, policy=Unprintable(1.0), sinks=[reports.append])
    saved = clipper.state_dict()
    assert saved["policy"] == "Unprintable(1.0)"
    monkeypatch.setattr(Unprintable, "fails", True)
    assert repr(clipper).startswith("GradClipper(policy=Unprintable(repr fails), norm_type=2.0, pa")
    model(torch.ones(4)).sum().backward()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(502):  # until it is said that nearly every step is clipped
            clipper.clip_()
            model.weight.grad.fill_(9.0)
    assert "clipped by Unprintable(repr fails): a threshold" in str(said[0].message)
    assert len(reports) == 502
    for save in (clipper.state_dict, lambda: clipper.load_state_dict(saved)):
        with pytest.raises(distclip.ConfigError, match=r"repr.* of a Unprintable fails"):
            save()


UNREAD = (
    "ConfigError: the repr() of a Unprintable fails (OSError: no name here); ranks compare "
    "policies and groupings by it, and checkpoints name them so. Mend its __repr__, or leave it "
    "out: then its class counts"
)


class UnprintableGroups:
    """A grouping of a user's own."""

    def __init__(self):
        self._inner = distclip.per_layer()

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def __repr__(self):
        return repr(Unprintable(1.0))


def built_with(what, on):
    model = nn.Linear(4, 3)
    fine, policy = distclip.FixedNorm(1.0), Unprintable(1.0)
    options = {
        "policy": {"policy": policy},
        "inside": {"policy": distclip.SkipSpikes(policy)},
        "rule": {"policy": fine, "groups": distclip.by_name({"*.bias": policy, "*": fine})},
        "watch": {"policy": fine, "watch": distclip.Watch(UnprintableGroups())},
    }[what]
    return refusal(
        lambda: distclip.GradClipper(
            model, **(options if dist.get_rank() in on else {"policy": fine})
        )
    )


@pytest.mark.parametrize("what", ["policy", "inside", "rule", "watch"])
def test_what_ranks_cannot_compare_is_refused_on_all(ranks, what):
    wanted = UNREAD.replace("Unprintable", "UnprintableGroups") if what == "watch" else UNREAD
    assert ranks.run(built_with, what, range(4)) == [wanted] * 4
    *others, own = ranks.run(built_with, what, [3])
    assert own == wanted
    text = f"AgreementError: another rank could not build its GradClipper:\nrank 3: {wanted}"
    assert others == [text] * 3


class Nothing:
    def __repr__(self):
        raise OSError("no name here")


@pytest.mark.parametrize(
    "options",
    [
        {"policy": Nothing()},
        {"max_norm": 1.0, "groups": distclip.by_name({"*": Nothing()})},
    ],
)
def test_what_is_no_policy_is_refused_even_if_it_cannot_be_printed(options):
    with pytest.raises(distclip.ConfigError, match=r"Nothing\(repr fails\)"):
        distclip.GradClipper(nn.Linear(4, 3), **options)
    with pytest.raises(distclip.ConfigError, match=r"Nothing\(repr fails\)"):
        distclip.SkipSpikes(Nothing())


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
