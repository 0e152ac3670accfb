"""What a user's policy returns is checked word by word, and its named tuples stay what they are."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

import distclip
from late import judged_late

GROUPS = ["a", "b", "c"]
F64 = torch.float64


def parameters():
    params = [(name, nn.Parameter(torch.zeros(2))) for name in GROUPS]
    for _, p in params:
        p.grad = torch.tensor([3.0, 4.0])
    return params


def clipper_of(policy, **options):
    return distclip.GradClipper(
        parameters(), policy=policy, **{"groups": distclip.per_parameter()} | options
    )


def ones(*shape, dtype=F64, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


class Flat:
    """Answers what it is told to, whatever the norms."""

    def __init__(self, answer=None, state=(), first=()):
        self.given = (distclip.Scale(ones(3), ones(3)) if answer is None else answer, state)
        self.first = first

    def __repr__(self):
        return "Flat(2)"

    def init(self, groups, device):
        return self.first

    def decide(self, norms, state):
        return self.given


def scale(coef=None, threshold=None, skip=None):
    return Flat(
        distclip.Scale(
            ones(3) if coef is None else coef, ones(3) if threshold is None else threshold, skip
        )
    )


def clamp(**fields):
    return Flat(
        distclip.Clamp(
            **{"value": ones(3), "clipped": ones(3) > 0, "norm_after": ones(3), "cosine": ones(3)}
            | fields
        )
    )


def by_units(**fields):
    policy = Flat(
        distclip.UnitScale(
            **{"threshold": ones(3), "clipped": ones(3) > 0, "norm_after": ones(3)} | fields
        )
    )
    policy.unit_coefs, policy.num_stats = lambda weight, grad: torch.ones_like(grad), 2
    return policy


def bare(given):
    policy = Flat()
    policy.given = given
    return policy


THREE, EACH = "float64 [3] on cpu", "an entry for each of its groups"
REFUSED = {
    "one for all": (
        scale(coef=ones(1)),
        f"decide() returned Scale.coef as float64 [1] on cpu; return {THREE}, {EACH}",
    ),
    "0-dim": (
        scale(coef=ones()),
        f"decide() returned Scale.coef as float64 [] on cpu; return {THREE}, {EACH}",
    ),
    "float32": (
        scale(coef=ones(3, dtype=torch.float32)),
        f"decide() returned Scale.coef as float32 [3] on cpu; return {THREE}, {EACH}",
    ),
    "another device": (
        scale(coef=ones(3, device="meta")),
        f"decide() returned Scale.coef as float64 [3] on meta; return {THREE}, {EACH}",
    ),
    "a number": (
        scale(threshold=2.5),
        f"decide() returned Scale.threshold as a value of type float; return {THREE}, {EACH}",
    ),
    "threshold": (
        scale(threshold=ones(1, 3)),
        f"decide() returned Scale.threshold as float64 [1, 3] on cpu; return {THREE}, {EACH}",
    ),
    "value": (
        clamp(value=ones(1)),
        f"decide() returned Clamp.value as float64 [1] on cpu; return {THREE}, {EACH}",
    ),
    "norm_after": (
        clamp(norm_after=None),
        f"decide() returned Clamp.norm_after as None; return {THREE}, {EACH}",
    ),
    "cosine": (
        clamp(cosine=ones(2)),
        f"decide() returned Clamp.cosine as float64 [2] on cpu; return {THREE}, {EACH}",
    ),
    "clipped": (
        clamp(clipped=ones(3)),
        f"decide() returned Clamp.clipped as float64 [3] on cpu; return bool [3] on cpu, {EACH}",
    ),
    "units' threshold": (
        by_units(threshold=ones()),
        f"decide() returned UnitScale.threshold as float64 [] on cpu; return {THREE}, {EACH}",
    ),
    "units' norm": (
        by_units(norm_after=ones(1)),
        f"decide() returned UnitScale.norm_after as float64 [1] on cpu; return {THREE}, {EACH}",
    ),
    "units clipped": (
        by_units(clipped=ones(1) > 0),
        f"decide() returned UnitScale.clipped as bool [1] on cpu; return bool [3] on cpu, {EACH}",
    ),
    "units without coefficients": (
        Flat(distclip.UnitScale(ones(3), ones(3) > 0, ones(3))),
        "decide() returned a UnitScale, but there is no unit_coefs to scale by; return a Scale or "
        "a Clamp",
    ),
    "skip of floats": (
        scale(skip=ones(3)),
        "decide() returned Scale.skip as float64 [3] on cpu; return bool [] on cpu or bool [3] on "
        "cpu, or None",
    ),
    "skip on the host": (
        scale(skip=True),
        "decide() returned Scale.skip as a value of type bool; return bool [] on cpu or bool [3] "
        "on cpu, or None",
    ),
    "skip of two": (
        scale(skip=ones(2) > 0),
        "decide() returned Scale.skip as bool [2] on cpu; return bool [] on cpu or bool [3] on "
        "cpu, or None",
    ),
    "no answer": (
        bare(None),
        "decide() returned None; return two things, a distclip.Scale, Clamp or UnitScale and the "
        "next state",
    ),
    "the answer alone": (
        bare(distclip.Scale(ones(3), ones(3))),
        "decide() returned a value of type Scale; return two things, a distclip.Scale, Clamp or "
        "UnitScale and the next state",
    ),
    "no record": (
        bare((ones(3), ())),
        "decide() returned float64 [3] on cpu as its answer; return a distclip.Scale, Clamp or "
        "UnitScale",
    ),
    "state of a list": (
        Flat(state=[], first=()),
        "decide() returned a value of type list as the next state, and init() a tuple (); return a "
        "tuple of as many tensors",
    ),
    "state too short": (
        Flat(state=(ones(),), first=(ones(), ones())),
        "decide() returned a tuple (Tensor) as the next state, and init() a tuple (Tensor, "
        "Tensor); return a tuple of as many tensors",
    ),
    "state of another dtype": (
        Flat(state=(ones(3), ones(dtype=torch.float32)), first=(ones(3), ones())),
        "decide() returned state[1] as float32 [] on cpu, and init() made it float64 [] on cpu; "
        "return the same",
    ),
    "state of another shape": (
        Flat(state=(ones(1),), first=(ones(3),)),
        "decide() returned state[0] as float64 [1] on cpu, and init() made it float64 [3] on cpu; "
        "return the same",
    ),
    "state of numbers": (
        Flat(state=(1.0,), first=(ones(),)),
        "decide() returned state[0] as a value of type float, and init() made it float64 [] on "
        "cpu; return the same",
    ),
    "init on another device": (
        Flat(first=(ones(), ones(device="meta"))),
        "init() made state[1] on meta; make it on cpu, the device it is given",
    ),
    "init of a tensor": (
        Flat(first=ones(3)),
        "init() returned float64 [3] on cpu; return a tuple of tensors, () where there is nothing "
        "to remember",
    ),
    "init of nothing": (
        Flat(first=None),
        "init() returned None; return a tuple of tensors, () where there is nothing to remember",
    ),
    "init of numbers": (
        Flat(first=(ones(), 0)),
        "init() returned a tuple (Tensor, int); return a tuple of tensors, () where there is "
        "nothing to remember",
    ),
    "in a warm-up": (
        distclip.Warmup(scale(coef=ones(1)), 5, 1.0),
        f"decide() returned Scale.coef as float64 [1] on cpu; return {THREE}, {EACH}",
    ),
    "in wrappers": (
        distclip.SkipSpikes(distclip.Warmup(Flat(state=(ones(1),), first=(ones(3),)), 5, 1.0)),
        "decide() returned state[0] as float64 [1] on cpu, and init() made it float64 [3] on cpu; "
        "return the same",
    ),
    "init in a wrapper": (
        distclip.SkipSpikes(Flat(first=ones(3))),
        "init() returned float64 [3] on cpu; return a tuple of tensors, () where there is nothing "
        "to remember",
    ),
}


@pytest.mark.parametrize("policy, text", REFUSED.values(), ids=REFUSED)
def test_a_malformed_answer_is_refused_when_the_clipper_is_built(policy, text):
    with pytest.raises(distclip.ConfigError) as caught:
        clipper_of(policy)
    assert str(caught.value) == f"Flat(2): {text}"


@pytest.mark.parametrize("skip", [None, ones(3) > 1, ones() > 1], ids=["none", "each", "one"])
def test_what_is_right_passes(skip):
    assert clipper_of(scale(coef=ones(3) / 2, skip=skip)).clip_().coefs.tolist() == [0.5] * 3
    assert clipper_of(clamp(value=ones(3) * 3.5, skip=skip)).clip_().threshold.tolist() == [3.5] * 3
    assert clipper_of(by_units(skip=skip)).clip_().clipped


def test_each_part_is_told_how_many_groups_it_has():
    groups = distclip.by_name({"a": scale(), "b": 1.0})
    with pytest.raises(distclip.ConfigError) as caught:
        clipper_of(distclip.FixedNorm(1.0), groups=groups)
    assert str(caught.value) == (
        f"Flat(2): decide() returned Scale.coef as float64 [3] on cpu; "
        f"return float64 [1] on cpu, {EACH}"
    )


class Loud:
    """Sends two numbers a group, of which only the shape plays a part here."""

    num_stats = 2

    def __init__(self, stats):
        self.stats = stats

    def init(self, groups, device):
        return ()

    def decide(self, norms, state):
        return distclip.Scale(
            torch.ones_like(norms.per_group), norms.stats.reshape(-1, 2).sum(1)
        ), state

    def local_stats(self, own):
        return self.stats


STATS = {
    "one for all": (ones(1), "float64 [1] on cpu"),
    "flat": (ones(6), "float64 [6] on cpu"),
    "turned": (ones(2, 3), "float64 [2, 3] on cpu"),
    "a list": ([1.0] * 6, "a value of type list"),
}


@pytest.mark.parametrize("stats, seen", STATS.values(), ids=STATS)
def test_local_stats_of_another_shape_are_refused(stats, seen):
    policy = Loud(ones(3, 2))
    clipper = clipper_of(policy)
    assert clipper.clip_().threshold.tolist() == [2.0] * 3
    policy.stats = stats
    with pytest.raises(distclip.GradientError) as caught:
        clipper.clip_()
    text = f"ConfigError: Loud: local_stats() returned {seen}; return [groups, words], here [3, 2]"
    assert str(caught.value).count(text) == 1


class Count(NamedTuple):
    total: torch.Tensor  # [groups] float64
    n: torch.Tensor  # [] int64


class Mean:
    """A threshold at the mean norm so far; reads its state by name alone."""

    def init(self, groups, device):
        return Count(
            torch.zeros(groups, dtype=F64, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
        )

    def decide(self, norms, state):
        new = Count(state.total + norms.per_group, state.n + 1)
        threshold = new.total / new.n
        return distclip.Scale(torch.ones_like(threshold), threshold), new


WRAPPED = {
    "alone": Mean(),
    "warm-up": distclip.Warmup(Mean(), 1, 100.0),
    "skipping": distclip.SkipSpikes(Mean()),
    "both": distclip.SkipSpikes(distclip.Warmup(Mean(), 1, 100.0)),
}


@pytest.mark.parametrize("policy", WRAPPED.values(), ids=WRAPPED)
def test_a_named_tuple_stays_one(policy):
    """Through set-up, steps, a checkpoint and another set-up."""
    clipper, again = clipper_of(policy), clipper_of(policy)
    first = clipper.clip_().threshold.tolist()
    again.load_state_dict(clipper.state_dict())
    again.rebuild()
    assert first in ([5.0] * 3, [100.0] * 3)
    assert clipper.clip_().threshold.tolist() == again.clip_().threshold.tolist() == [5.0] * 3
    assert clipper.state_dict().keys() == again.state_dict().keys()


class Shifted:
    """The threshold is the norm of two steps ago: the state moves on from one place to the next,
    and the answer is a state."""

    def init(self, groups, device):
        return tuple(
            torch.full((groups,), float("inf"), dtype=F64, device=device) for _ in range(2)
        )

    def decide(self, norms, state):
        last, before = state
        return distclip.Scale(torch.ones_like(before), before), (norms.per_group, last)


class Bounded(Shifted):
    """The same by clamping."""

    def decide(self, norms, state):
        last, before = state
        answer = distclip.Clamp(
            before, norms.per_group > before, norms.per_group, torch.ones_like(last)
        )
        return answer, (norms.per_group, last)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("policy", [Shifted(), Bounded()], ids=["scaled", "clamped"])
def test_states_that_move_on_and_are_answers_too(policy, waits):
    p = nn.Parameter(torch.zeros(1))
    clipper = distclip.GradClipper([("a", p)], policy=policy, on_nonfinite="propagate")
    judged_late(clipper, waits)
    thresholds, left = [], []
    for size in (1.0, 2.0, 3.0, 4.0, 5.0):
        p.grad = torch.tensor([size])
        thresholds.append(clipper.clip_().threshold.item())
        left.append(p.grad.item())
    assert thresholds == [float("inf"), float("inf"), 1.0, 2.0, 3.0]
    assert left == (
        [1.0, 2.0, 1.0, 2.0, 3.0] if isinstance(policy, Bounded) else [1.0, 2.0, 3.0, 4.0, 5.0]
    )


class InPlace:
    """Writes to its state, which `Policy` asks it not to."""

    def init(self, groups, device):
        return (torch.zeros(groups, dtype=torch.float64, device=device),)

    def decide(self, norms, state):
        (count,) = state
        count.add_(1)
        return distclip.Scale(torch.ones_like(count), count.clone()), state


@pytest.mark.parametrize("on_nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("around", [None, distclip.SkipSpikes], ids=str)
def test_what_set_up_asks_a_policy_leaves_no_trace_in_its_state(on_nonfinite, around):
    policy = around(InPlace()) if around else InPlace()
    p = torch.nn.Parameter(torch.zeros(3))
    clipper = distclip.GradClipper([("a", p)], policy=policy, on_nonfinite=on_nonfinite)
    counts = []
    for _ in range(3):
        p.grad = torch.ones(3)
        counts.append(clipper.clip_().threshold.item())
    assert counts == [1.0, 2.0, 3.0]


def test_copies_and_kept_states_are_of_the_same_kind():
    from distclip.policies.state import clone_state, select_state

    old, new = Count(ones(2), ones()), Count(2 * ones(2), 2 * ones())
    assert (
        isinstance(clone_state(old), Count)
        and clone_state(old).total is not old.total
        and clone_state((ones(),)) == (ones(),)
    )
    for finite, want in ((True, new), (False, old)):
        (state,) = select_state(torch.tensor(finite), (old,), (new,))
        assert isinstance(state, Count) and all(
            torch.equal(a, b) for a, b in zip(state, want, strict=True)
        )


def test_watched_groups_with_policies_of_no_name_are_equal_on_all_ranks(ranks):
    assert ranks.run(watching) == [["a", "rest"]] * 4


def watching():
    """The repr of a `Mean` holds its address, which is another one on each rank."""
    globals()["ballast"] = [Mean() for _ in range(1 + 100 * torch.distributed.get_rank())]
    watch = distclip.Watch(distclip.by_name({"a": Mean()}), every=2)
    return list(distclip.GradClipper(parameters(), 1.0, watch=watch).plan.layers)


def test_the_text_of_a_watch():
    from distclip.setup.options import PassedOptions, check_options

    def text(watch):
        return check_options(
            PassedOptions(1.0, None, 2.0, None, "skip", 1e-5, 20, "auto", watch)
        ).config_texts()["watch"]

    table = {"a": Mean(), "b": 1.0, "c": distclip.Exempt()}
    assert text(None) == "None"
    assert text(distclip.Watch(distclip.per_layer(2), every=3)) == (
        "Watch(PerLayer(depth=2), every=3)"
    )
    assert text(distclip.Watch(distclip.by_name(table))) == (
        "Watch(ByName(a: Mean, b: 1.0, c: Exempt(in_total=False)), every=10)"
    )


UNITS = (
    "scales by units, and a threshold of the norm cannot stand in for it; wrap a policy that "
    "scales by one coefficient"
)


def test_a_warm_up_over_units_is_refused():
    for policy, name in (
        (distclip.AGC(), "AGC(clipping=0.01, eps=0.001)"),
        (
            distclip.SkipSpikes(distclip.AGC()),
            "SkipSpikes(AGC(clipping=0.01, eps=0.001), "
            "sigma=6.0, window=128, warmup=64, factor=2.0)",
        ),
        (by_units(), "Flat(2)"),
    ):
        with pytest.raises(distclip.ConfigError) as caught:
            distclip.Warmup(policy, 5, 1.0)
        assert str(caught.value) == f"Warmup: {name} {UNITS}"
