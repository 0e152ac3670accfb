"""The numbers of a rule may change at resume, which is said once; another kind of rule, or a state
of another size, may not."""

import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import distclip

INF = float("inf")


class Own:
    """A user's policy, whose text has more than numbers."""

    def __init__(self, factor, mode="mean"):
        self.factor, self.mode = factor, mode

    def __repr__(self):
        return f"Own(factor={self.factor}, mode={self.mode!r})"

    def init(self, groups, device):
        return (torch.zeros(groups, dtype=torch.float64, device=device),)

    def decide(self, norms, state):
        threshold = torch.full_like(norms.per_group, self.factor)
        return distclip.Scale(torch.ones_like(threshold), threshold), (state[0] + norms.per_group,)


def trained(policy, groups=None, steps=6):
    """A clipper that has seen some steps, and its parameters."""
    params = [(f"p{i}", nn.Parameter(torch.zeros(5))) for i in range(6)]
    clipper = distclip.GradClipper(params, policy=policy, groups=groups)
    for step in range(steps):
        again(clipper, params, step)
    return clipper, params


def again(clipper, params, step):
    for i, (_, p) in enumerate(params):
        p.grad = torch.randn(5, generator=torch.Generator().manual_seed(10 * step + i))
    return clipper.clip_()


def state_of(clipper):
    return {
        name: value.tolist()
        for name, value in clipper.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


CHANGES = {
    "threshold": (distclip.FixedNorm(2.0), distclip.FixedNorm(0.5)),
    "no threshold before": (distclip.FixedNorm(INF), distclip.FixedNorm(0.5)),
    "value": (distclip.FixedValue(2.0), distclip.FixedValue(0.25)),
    "length": (distclip.Normalize(2.0), distclip.Normalize(1e-5)),
    "more points": (
        distclip.Scheduled([(0, 2.0)]),
        distclip.Scheduled([(0, 2.0), (6, 0.5), (9, 0.25)]),
    ),
    "percentile": (distclip.AutoClip(10.0, window=8), distclip.AutoClip(55, window=8)),
    "zclip": (distclip.ZClip(), distclip.ZClip(1.5, 0.9, 3, 2.0)),
    "adagc": (distclip.AdaGC(), distclip.AdaGC(1.5, 2.0, 0.5, 3)),
    "agc": (distclip.AGC(0.01), distclip.AGC(0.5, eps=0.1)),
    "a wrapper's": (
        distclip.Warmup(distclip.ZClip(), 3, 1.0),
        distclip.Warmup(distclip.ZClip(), 9, 2.0),
    ),
    "in a wrapper": (
        distclip.SkipSpikes(distclip.FixedNorm(2.0)),
        distclip.SkipSpikes(distclip.FixedNorm(0.5), sigma=3.0),
    ),
    "rungs": (
        distclip.Escalate(distclip.FixedNorm(2.0)),
        distclip.Escalate(distclip.FixedNorm(2.0), 2, 5, 9),
    ),
    "a user's": (Own(2.0), Own(-0.5)),
    "numpy's": (distclip.FixedNorm(np.float64(2.0)), distclip.FixedNorm(0.5)),
}


@pytest.mark.parametrize("old, new", CHANGES.values(), ids=CHANGES)
def test_other_numbers_hold_from_the_next_step_and_are_said_once(old, new):
    """What was gathered goes on: as if the rule had had the new numbers at this step alone."""
    saved, _ = trained(old)
    clipper, params = trained(new, steps=0)
    with pytest.warns(RuntimeWarning) as said:
        clipper.load_state_dict(saved.state_dict())
    assert [str(warning.message) for warning in said] == [
        f"a rule of the clipper has another number than in the checkpoint: {old} became {new} "
        f"(all): the new number holds from the next "
        "step on, and steps and statistics go on from the checkpoint. If that is meant there is "
        "nothing to do; to start the statistics "
        "anew, resume without the clipper's state"
    ]
    assert said[0].filename == __file__, "the user's line"
    assert state_of(clipper) == state_of(saved)
    (state,), report = saved._state.policies, again(clipper, params, 6)
    group, total = report.group_norms.double(), report.total_norm.double()
    stats = group.new_zeros(getattr(new, "num_stats", 0))
    answer, _ = new.decide(
        distclip.Norms(group, total, torch.tensor(True), torch.tensor(0), stats, 2.0), state
    )
    shown = answer.value if isinstance(answer, distclip.Clamp) else answer.threshold
    assert report.step == 7 and report.threshold.tolist() == shown.float().tolist()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_through_torchs_checkpoints_it_is_the_users_line_too(tmp_path):
    dcp.save({"clipper": trained(distclip.AutoClip(10.0, window=8))[0]}, checkpoint_id=tmp_path)
    clipper, _ = trained(distclip.AutoClip(90.0, window=8), steps=0)
    with pytest.warns(
        RuntimeWarning,
        match=r"AutoClip\(percentile=10.0, .* became "
        r"AutoClip\(percentile=90.0,",
    ) as said:
        dcp.load({"clipper": clipper}, checkpoint_id=tmp_path)
    assert [w.filename for w in said if w.category is RuntimeWarning] == [__file__]
    assert int(clipper.state_dict()["step"]) == 6


def loaded(saved, **options):
    """What is said when its state is loaded into a clipper of these options."""
    clipper, _ = trained(**options, steps=0)
    before = state_of(clipper)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            clipper.load_state_dict(saved.state_dict())
        except distclip.ConfigError as error:
            assert state_of(clipper) == before, "nothing is taken over"
            assert not said
            return f"refused: {error}"
    return "\n".join(str(warning.message).partition(": the new number")[0] for warning in said)


def test_each_rule_that_changed_is_named_with_its_groups():
    said = "a rule of the clipper has another number than in the checkpoint: "
    main = distclip.FixedNorm(1.0)
    saved, _ = trained(main, distclip.by_name({"p0": 2.0, "p[1-3]": distclip.ZClip()}))
    same = distclip.by_name({"p0": 2, "p[1-3]": distclip.ZClip()})
    assert loaded(saved, policy=distclip.FixedNorm(1), groups=same) == "", "1 is 1.0"
    other = distclip.by_name({"p0": 0.5, "p[1-3]": distclip.ZClip(3.0)})
    zclip = "ZClip(z_threshold={}, alpha=0.97, warmup=25, max_norm=inf)"
    assert loaded(saved, policy=main, groups=other) == (
        f"{said}FixedNorm(max_norm=2.0) became FixedNorm(max_norm=0.5) (p0); {zclip.format(2.5)} "
        f"became {zclip.format(3.0)} (p[1-3])"
    )
    assert loaded(saved, policy=distclip.FixedNorm(3.0), groups=same) == (
        f"{said}FixedNorm(max_norm=1.0) became FixedNorm(max_norm=3.0) (rest)"
    )
    each = distclip.per_parameter()
    assert loaded(trained(main, each)[0], policy=distclip.FixedNorm(0.25), groups=each) == (
        f"{said}FixedNorm(max_norm=1.0) became FixedNorm(max_norm=0.25) (p0, p1, p2 and 3 more)"
    )
    all_named = {"p[0-2]": 1.0, "p*": 2.0}  # the main policy governs no group
    assert loaded(
        trained(main, distclip.by_name(all_named))[0],
        policy=distclip.FixedNorm(5.0),
        groups=distclip.by_name(all_named),
    ) == (f"{said}FixedNorm(max_norm=1.0) became FixedNorm(max_norm=5.0)")


SIZES = {
    "autoclip": (
        distclip.AutoClip(window=9),
        distclip.AutoClip(window=5),
        "0.0 is (1, 9), this clipper's (1, 5)",
    ),
    "skip spikes": (
        distclip.SkipSpikes(distclip.FixedNorm(1.0), window=70),
        distclip.SkipSpikes(distclip.FixedNorm(1.0), window=90),
        "0.0 is (1, 70), this clipper's (1, 90)",
    ),
    "in a wrapper": (
        distclip.Warmup(distclip.AutoClip(window=9), 3, 1.0),
        distclip.Warmup(distclip.AutoClip(window=5), 4, 1.0),
        "0.1 is (1, 9), this clipper's (1, 5)",
    ),
}


@pytest.mark.parametrize("old, new, sizes", SIZES.values(), ids=SIZES)
def test_a_number_that_sets_the_size_of_the_state_may_not_change(old, new, sizes):
    assert loaded(trained(old)[0], policy=new) == (
        f"refused: a rule of the clipper has another number than in the checkpoint: {old} became "
        f"{new} (all), "
        f"and this number cannot change at resume: the checkpoint's {sizes}. Build it with the "
        f"saved number, "
        "or resume without the clipper's state to start it anew"
    )


KINDS = {
    "fixed, normalize": (distclip.FixedNorm(1.0), distclip.Normalize(1.0)),
    "zclip, autoclip": (distclip.ZClip(), distclip.AutoClip()),
    "wrapped or not": (distclip.ZClip(), distclip.SkipSpikes(distclip.ZClip())),
    "another inside": (
        distclip.Warmup(distclip.ZClip(), 3, 1.0),
        distclip.Warmup(distclip.AdaGC(), 3, 1.0),
    ),
    "order of wrappers": (
        distclip.Warmup(distclip.SkipSpikes(distclip.ZClip()), 3, 1.0),
        distclip.SkipSpikes(distclip.Warmup(distclip.ZClip(), 3, 1.0)),
    ),
    "a word of a user's": (Own(1.0), Own(1.0, "median")),
    "a function for points": (distclip.Scheduled([(0, 1.0)]), distclip.Scheduled(torch.ones_like)),
}


@pytest.mark.parametrize("old, new", KINDS.values(), ids=KINDS)
def test_another_kind_of_rule_is_refused(old, new):
    for one, other in ((old, new), (new, old)):
        text = (
            f"refused: the checkpoint's policy is {repr(one)!r}, this clipper's "
            f"{repr(other)!r}; build it as the saved one was"
        )
        assert loaded(trained(one)[0], policy=other) == text
        rules = distclip.by_name({"p*": one}), distclip.by_name({"p*": other})
        main = distclip.FixedNorm(1.0)
        text = (
            f"refused: the checkpoint's rules is {f'{one}: p*'!r}, this clipper's "
            f"{f'{other}: p*'!r}; build it as the saved one was"
        )
        assert loaded(trained(main, rules[0])[0], policy=main, groups=rules[1]) == text
