"""What holds for every policy: no host sync, texts of refusals, equal names on all ranks, wrappers,
checkpoints, a run end to end."""

import functools
import io
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import distclip
from policies.cases import CASES, decaying
from policies.test_trace import FINITE, GROUPS, NORMS, STEPS, TOTAL, at, skips
from skips import told

INF, NAN = math.inf, math.nan
SYNCS = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "is_nonzero",
    "equal",
    "lift_fresh",
    "masked_select",
    "unique",
)


class NoSync(TorchDispatchMode):
    """Fails on what waits for a device, on constants that are made on the host, and on any copy to
    another device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in SYNCS, f"{name} waits for the device"
        out = func(*args, **(kwargs or {}))
        devices = {a.device for a in (*args, out) if isinstance(a, torch.Tensor)}
        assert len(devices) <= 1, f"{name} goes from device to device: {devices}"
        return out


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", CASES)
def test_no_host_sync(name, device):
    policy, _ = CASES[name]
    state, norms = policy.init(GROUPS, torch.device(device)), at(1, device)
    with NoSync():
        for _ in range(3):
            answer, state = policy.decide(norms, state)
    assert {t.device.type for t in (answer.coef, answer.threshold, *state)} == {device}


def test_the_check_for_syncs_can_fail():
    for read in (bool, float, lambda t: t.nonzero(), lambda t: t + torch.tensor([1.0])):
        with pytest.raises(AssertionError), NoSync():
            read(torch.ones(1))


REFUSED = {
    "no points": (
        lambda: distclip.Scheduled([]),
        "Scheduled: schedule has no points; give at least one (step, threshold)",
    ),
    "steps fall": (
        lambda: distclip.Scheduled([(5, 1), (5, 2)]),
        "Scheduled: step 5 comes after step 5; the steps of the points must rise",
    ),
    "negative point": (
        lambda: distclip.Scheduled([(0, 1), (9, -1)]),
        "Scheduled: the threshold at step 9=-1.0 is not a threshold; it must be positive (math.inf "
        "only measures)",
    ),
    "infinite point": (
        lambda: distclip.Scheduled([(0, INF), (9, 1)]),
        "Scheduled: point (0, inf) is not finite; to clip nothing at first, use Warmup",
    ),
    "bad function": (
        lambda: distclip.Scheduled(lambda step: step - 1),
        "Scheduled: schedule(0)=-1.0 is not a threshold; it must be positive (math.inf only "
        "measures)",
    ),
    "percentile": (
        lambda: distclip.AutoClip(101),
        "AutoClip: percentile=101 must be from 0 to 100; the paper takes 10",
    ),
    "percentile NaN": (
        lambda: distclip.AutoClip(NAN),
        "AutoClip: percentile=nan must be from 0 to 100; the paper takes 10",
    ),
    "no window": (
        lambda: distclip.AutoClip(window=0),
        "AutoClip: window=0 must be a whole number of at least 1; it counts the norms that are kept",
    ),
    "z": (
        lambda: distclip.ZClip(0),
        "ZClip: z_threshold=0 must be positive and finite; the paper takes 2.5",
    ),
    "alpha": (
        lambda: distclip.ZClip(alpha=1.0),
        "ZClip: alpha=1.0 must be between 0 and 1; the paper takes 0.97",
    ),
    "short warm-up": (
        lambda: distclip.ZClip(warmup=1),
        "ZClip: warmup=1 must be a whole number of at least 2; a variance needs two norms",
    ),
    "bound": (
        lambda: distclip.ZClip(max_norm=0),
        "ZClip: max_norm=0 must be positive (math.inf sets no bound)",
    ),
    "lambda_rel": (
        lambda: distclip.AdaGC(0.9),
        "AdaGC: lambda_rel=0.9 must be at least 1 and finite, or every norm shrinks to 0; 1.04 is "
        "usual",
    ),
    "lambda_abs": (
        lambda: distclip.AdaGC(lambda_abs=NAN),
        "AdaGC: lambda_abs=nan must be positive (math.inf only measures in the warm-up)",
    ),
    "beta": (
        lambda: distclip.AdaGC(beta=1),
        "AdaGC: beta=1 must be at least 0 and below 1; 0.99 is usual",
    ),
    "adagc warm-up": (
        lambda: distclip.AdaGC(warmup=0.5),
        "AdaGC: warmup=0.5 must be a whole number of at least 1; the first norm starts γ",
    ),
    "no policy": (
        lambda: distclip.Warmup("norm", 5, 1.0),
        "Warmup: policy='norm' has no init and decide; pass e.g. distclip.FixedNorm(1.0)",
    ),
    "clamps": (
        lambda: distclip.Warmup(distclip.FixedValue(1.0), 5, 1.0),
        "Warmup: FixedValue(clip_value=1.0) clamps elements, and a threshold of the norm cannot "
        "stand in for it; wrap a policy that scales",
    ),
    "no steps": (
        lambda: distclip.Warmup(distclip.ZClip(), 0, 1.0),
        "Warmup: steps=0 must be a whole number of at least 1; without any, use the policy alone",
    ),
    "warm-up norm": (
        lambda: distclip.Warmup(distclip.ZClip(), 5, -1),
        "Warmup: max_norm=-1 must be positive (math.inf only measures)",
    ),
    "a class": (
        lambda: distclip.SkipSpikes(distclip.ZClip),
        "SkipSpikes: policy=<class 'distclip.policies.zclip.ZClip'> has no init and decide; pass "
        "e.g. distclip.FixedNorm(1.0)",
    ),
    "sigma": (
        lambda: distclip.SkipSpikes(distclip.ZClip(), -1),
        "SkipSpikes: sigma=-1 must be positive and finite; 6 is usual",
    ),
    "spike window": (
        lambda: distclip.SkipSpikes(distclip.ZClip(), window=1),
        "SkipSpikes: window=1 must be a whole number of at least 2; it counts the norms that are "
        "kept",
    ),
    "spike warm-up": (
        lambda: distclip.SkipSpikes(distclip.ZClip(), warmup=129),
        "SkipSpikes: warmup=129 must be a whole number from 2 to window=128",
    ),
    "factor": (
        lambda: distclip.SkipSpikes(distclip.ZClip(), factor=0.5),
        "SkipSpikes: factor=0.5 must be at least 1 and finite; a spike is above the mean",
    ),
}


@pytest.mark.parametrize("make, text", REFUSED.values(), ids=REFUSED)
def test_refused_word_by_word(make, text):
    with pytest.raises(distclip.ConfigError) as caught:
        make()
    assert str(caught.value) == text


@pytest.mark.parametrize(
    "make",
    [
        lambda **k: distclip.Scheduled([(0, 0)], **k),
        lambda **k: distclip.Scheduled(torch.zeros_like, **k),
    ],
)
def test_a_schedule_reaches_zero_only_if_asked(make):
    with pytest.raises(ValueError, match="allow_zero=True"):
        make()
    assert (
        make(allow_zero=True)
        .decide(at(1), (torch.zeros((), dtype=torch.int64),))[0]
        .threshold.tolist()
        == [0.0] * GROUPS
    )


def test_names_are_equal_on_all_ranks():
    """They are compared between ranks and with checkpoints, so that no address may be in them."""
    named = [policy for policy, _ in CASES.values()]
    named += [
        distclip.Scheduled(functools.partial(torch.add, other=1)),
        distclip.SkipSpikes(Twice()),
        distclip.Warmup(Twice(), 3, 1.0),
    ]
    assert not [repr(policy) for policy in named if " at 0x" in repr(policy)]
    assert repr(distclip.Scheduled(decaying)) == "Scheduled(policies.cases.decaying)"
    assert repr(distclip.Scheduled([(0, 1)])) == "Scheduled(((0.0, 1.0),))"
    assert repr(distclip.SkipSpikes(Twice())) == (
        "SkipSpikes(Twice, sigma=6.0, window=128, warmup=64, factor=2.0)"
    )


class Twice:
    """A user's own policy, here in 12 lines: at most twice the mean norm so far."""

    def init(self, groups, device):
        zeros = torch.zeros(groups, dtype=torch.float64, device=device)
        return zeros, zeros.clone()

    def decide(self, norms, state):
        total, count = state
        threshold = torch.where(count > 0, 2 * total / count, torch.full_like(total, math.inf))
        coef = torch.where(
            norms.per_group > threshold, threshold / norms.per_group, torch.ones_like(total)
        )
        return distclip.Scale(coef, threshold), (total + norms.per_group, count + 1)


def parameters():
    return [
        (f"layer{i}.weight", nn.Parameter(torch.zeros(1, dtype=torch.float64)))
        for i in range(GROUPS)
    ]


def run(clipper, params, steps):
    """One call for each step of the trace; a step that is bad elsewhere in the model is made bad by
    a NaN."""
    reports = []
    for step in steps:
        for i, (_, p) in enumerate(params):
            p.grad = torch.tensor(
                [NAN if not FINITE[step] and i == 0 else NORMS[step, i]], dtype=torch.float64
            )
        reports.append(clipper.clip_())
    return reports


@pytest.mark.parametrize("name", [n for n in CASES if "skip" not in n])
@told()
def test_a_clipper_follows_the_reference(name):
    policy, make = CASES[name]
    params, oracle = parameters(), make()
    clipper = distclip.GradClipper(params, policy=policy, groups=distclip.per_parameter())
    for step in range(STEPS):
        report = run(clipper, params, [step])[0]
        assert bool(report.skipped) == (not FINITE[step])
        if FINITE[step]:
            thresholds, coefs, _ = oracle.step(NORMS[step], TOTAL[step])
            assert report.threshold.tolist() == pytest.approx(thresholds, rel=1e-6, abs=0), step
            assert report.coefs.tolist() == pytest.approx(coefs, rel=1e-6, abs=0), step
            assert [p.grad.item() for _, p in params] == pytest.approx(
                [n * c for n, c in zip(NORMS[step], coefs, strict=True)], rel=1e-6
            )


@pytest.mark.parametrize(
    "policy", [*(p for p, _ in CASES.values()), Twice()], ids=[*CASES, "a user's"]
)
@told()
def test_a_checkpoint_goes_on_bit_for_bit(policy):
    params = parameters()
    clipper = distclip.GradClipper(params, policy=policy, groups=distclip.per_parameter())
    run(clipper, params, range(110))
    file = io.BytesIO()
    torch.save(clipper.state_dict(), file)
    file.seek(0)
    again = distclip.GradClipper(params, policy=policy, groups=distclip.per_parameter())
    again.load_state_dict(torch.load(file, weights_only=True))
    for one, other in zip(
        run(clipper, params, range(110, 160)), run(again, params, range(110, 160)), strict=True
    ):
        assert (
            torch.equal(one.threshold, other.threshold)
            and torch.equal(one.coefs, other.coefs)
            and one.step == other.step
        )


def test_wrappers_pass_on_what_the_inner_policy_adds_to_the_message():
    inner = distclip.FixedValue(0.5)
    policy = distclip.SkipSpikes(inner, window=4, warmup=2)
    assert isinstance(policy, distclip.LocalStats) and policy.num_stats == inner.num_stats
    assert not isinstance(distclip.SkipSpikes(distclip.FixedNorm(1.0)), distclip.LocalStats)
    params = [("w", nn.Parameter(torch.zeros(2)))]
    clipper = distclip.GradClipper(params, policy=policy)
    params[0][1].grad = torch.tensor([0.25, -3.0])
    report = clipper.clip_()
    assert params[0][1].grad.tolist() == [0.25, -0.5] and report.clipped


def test_a_warm_up_over_a_policy_that_turns_out_to_clamp_is_refused():
    policy = distclip.Warmup(distclip.SkipSpikes(distclip.FixedValue(1.0)), 5, 1.0)
    params = [("w", nn.Parameter(torch.zeros(2)))]
    params[0][1].grad = torch.ones(2)
    with pytest.raises(
        distclip.ConfigError,
        match=r"Warmup: SkipSpikes\(FixedValue\(clip_value=1.0\).* clamps elements",
    ):
        distclip.GradClipper(params, policy=policy).clip_()


def test_a_group_without_gradients_at_first_is_not_held_at_zero():
    """Zero-initialised adapters, experts without a token: their norm is 0 for a while, and then
    must not be clipped to 0."""
    for name in ("autoclip", "zclip", "adagc"):
        policy, _ = CASES[name]
        state = policy.init(GROUPS, torch.device("cpu"))
        for step in range(20, 60):
            norms = at(step)
            norms.per_group[1] = 0
            _, state = policy.decide(norms, state)
        answer, _ = policy.decide(at(61), state)
        assert answer.coef[1] > 0.01, name


def test_a_spike_changes_no_state_and_is_told():
    policy, _ = CASES["skip spikes"]
    state = policy.init(GROUPS, torch.device("cpu"))
    for step in range(1, 150):
        _, state = policy.decide(at(step), state)
    for _ in range(30):
        answer, new = policy.decide(at(150), state)
        assert skips(answer) and all(torch.equal(a, b) for a, b in zip(state, new, strict=True))
    answer, _ = policy.decide(at(153), state)
    assert not skips(answer)
