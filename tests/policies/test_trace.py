"""On the recorded trace every policy gives the thresholds, coefficients and skips of its reference;
its state stays finite."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import distclip
from distclip.records import ACTIONS, Norms
from policies.cases import CASES
from policies.trace import GROUPS, STEPS, recorded

NORMS, TOTAL, FINITE = recorded()


def at(step, device="cpu"):
    return Norms(
        torch.tensor(NORMS[step], device=device),
        torch.tensor(TOTAL[step], device=device),
        torch.tensor(bool(FINITE[step]), device=device),
        torch.tensor(int(not FINITE[step]), device=device),
        torch.zeros(0, dtype=torch.float64, device=device),
        2.0,
    )


def skips(answer):
    return answer.skip is not None and bool(answer.skip.any())


def equal(a, b):
    """Bit for bit, NaN included."""
    return len(a) == len(b) and all(
        torch.equal(x.nan_to_num(-1), y.nan_to_num(-1)) for x, y in zip(a, b, strict=True)
    )


def test_the_trace_is_not_tame():
    assert NORMS.shape == (STEPS, GROUPS) and STEPS >= 300
    bad = NORMS[~FINITE]
    assert (
        np.isnan(bad).any()
        and np.isinf(bad).any()
        and np.isfinite(bad).all(1).any()
        and (NORMS[FINITE] == 0).any()
    )


@pytest.mark.parametrize("name", CASES)
def test_thresholds_and_coefficients_are_those_of_the_reference(name):
    policy, make = CASES[name]
    oracle, state = make(), policy.init(GROUPS, torch.device("cpu"))
    observed = getattr(policy, "num_observed", 0)
    coefs, skipped, actions = [], 0, []
    for step in range(STEPS):
        answer, new = policy.decide(at(step), state)
        if FINITE[step]:
            thresholds, want, skip = oracle.step(NORMS[step], TOTAL[step])
            assert answer.threshold.tolist() == pytest.approx(thresholds, rel=1e-9, abs=0), step
            assert answer.coef.tolist() == pytest.approx(want, rel=1e-9, abs=0), step
            assert skips(answer) == skip, step
            coefs.append(want)
            skipped += skip
            assert not skip or equal(state[observed:], new[observed:]), step
        else:
            assert equal(state[observed:], new[observed:]) and not skips(answer), step
            assert not answer.threshold.isnan().any(), step
            if observed:
                oracle.bad()
        if observed:
            actions.append(ACTIONS[answer.action])
            assert actions[-1] == oracle.action, step
        assert all(t.isfinite().all() for t in new), step
        state = new
    if name != "autoclip, maximum":
        # not vacuous: some steps are clipped, some are not
        assert 0 < np.mean(np.array(coefs) < 1) < 1
    assert (skipped >= 4) == ("skip" in name)
    if observed:
        rungs = {rung for rung in ACTIONS[1:] if getattr(policy, rung)}
        assert set(actions) == {"none"} | rungs, "vacuous"
    assert [t.shape for t in state] == [t.shape for t in policy.init(GROUPS, torch.device("cpu"))]


@pytest.mark.parametrize("name", CASES)
def test_pure_and_right_from_the_first_step(name):
    policy, _ = CASES[name]
    state = policy.init(GROUPS, torch.device("cpu"))
    for step in range(1, 160):  # step 1 is the first of a run; at 150 there is a spike
        norms = at(step)
        inputs = [norms.per_group, norms.total, norms.finite, norms.nonfinite, norms.stats, *state]
        versions, before = [t._version for t in inputs], [t.clone() for t in inputs]
        answer, new = policy.decide(norms, state)
        # a plain tuple is what the clipper hands on
        again, same = policy.decide(norms, tuple(state))
        assert [t._version for t in inputs] == versions and equal(inputs, before)
        assert equal((answer.coef, answer.threshold), (again.coef, again.threshold)) and equal(
            new, same
        )
        assert (
            answer.coef.dtype == answer.threshold.dtype == torch.float64
            and answer.coef.shape == (GROUPS,)
        )
        assert not answer.coef.isnan().any() and not answer.threshold.isnan().any()
        state = new


@pytest.mark.parametrize("name", CASES)
def test_groups_do_not_mix_but_in_what_is_said_of_the_total(name):
    policy, _ = CASES[name]
    if "skip" in name:
        return  # a step is judged as a whole
    together, alone = (
        policy.init(GROUPS, torch.device("cpu")),
        [policy.init(1, torch.device("cpu")) for _ in range(GROUPS)],
    )
    for step in range(120):
        norms = at(step)
        answer, together = policy.decide(norms, together)
        for group in range(GROUPS):
            one = replace(norms, per_group=norms.per_group[[group]])
            own, alone[group] = policy.decide(one, alone[group])
            assert answer.threshold[group] == own.threshold[0] and (
                answer.coef[group] == own.coef[0] or not FINITE[step]
            )


@pytest.mark.parametrize("size", [1e-30, 1e40])
@pytest.mark.parametrize(
    "name", [n for n in CASES if n.startswith(("autoclip", "zclip", "skip")) and "bounded" not in n]
)
def test_norms_of_any_size(name, size):
    policy, _ = CASES[name]
    state, scaled = (policy.init(GROUPS, torch.device("cpu")) for _ in range(2))
    for step in range(160):
        norms = at(step)
        large = replace(norms, per_group=norms.per_group * size, total=norms.total * size)
        answer, state = policy.decide(norms, state)
        other, scaled = policy.decide(large, scaled)
        if FINITE[step]:
            assert other.coef.tolist() == pytest.approx(answer.coef.tolist(), rel=1e-9) and skips(
                answer
            ) == skips(other)


@pytest.mark.parametrize("name", CASES)
def test_a_norm_that_overflows_on_its_own_is_not_taken_in(name):
    """`finite` is read from the sums, before `grad_scale`: a norm may still be inf."""
    policy, _ = CASES[name]
    state = policy.init(GROUPS, torch.device("cpu"))
    for step in range(20, 40):
        _, state = policy.decide(at(step), state)
    norms = at(40)
    norms.per_group[0] = norms.total.fill_(math.inf)
    _, new = policy.decide(norms, state)
    assert all(t.isfinite().all() for t in new)
    answer, _ = policy.decide(at(41), new)
    assert (answer.coef > 0.001).all()


@pytest.mark.parametrize("sigma, factor", [(3.0, 1.0), (6.0, 1.0), (0.5, 2.0)])
def test_the_limit_of_a_spike_to_the_last_digits(sigma, factor):
    policy = distclip.SkipSpikes(distclip.FixedNorm(1.0), sigma, window=10, warmup=5, factor=factor)
    state = policy.init(1, torch.device("cpu"))
    calm = 5 + np.sin(np.arange(25))

    def one(norm):
        return replace(at(1), per_group=torch.tensor([norm], dtype=torch.float64))

    for norm in calm:
        answer, state = policy.decide(one(norm), state)
        assert factor == 1 or not skips(answer)
    taken = state[0].numpy()
    limit = max(taken.mean() + sigma * taken.std(ddof=1), factor * taken.mean())
    assert not skips(policy.decide(one(limit * (1 - 1e-12)), state)[0]) and skips(
        policy.decide(one(limit * (1 + 1e-12)), state)[0]
    )


@pytest.mark.parametrize("p", [1.0, 2.0, 8.0, math.inf])
def test_a_step_is_judged_by_the_norm_over_the_groups(p):
    policy, _ = CASES["skip spikes"]
    norms = at(10)
    history = policy.decide(replace(norms, norm_type=p), policy.init(GROUPS, torch.device("cpu")))[
        1
    ][0]
    assert history[0, 0].item() == pytest.approx(np.linalg.norm(NORMS[10], p), rel=1e-12)
