"""A step that a policy leaves out: nothing moves, a scaler does not take it for an overflow, and a
long streak of them ends."""

import pytest
import torch
from torch import nn

import distclip
import skips
from late import judged_late

SPIKE = 9


def job(waits=False, fused=True, **options):
    p = nn.Parameter(torch.zeros(2))
    policy = distclip.SkipSpikes(distclip.AutoClip(50), 3, 16, 4)
    clipper = distclip.GradClipper([("w", p)], policy=policy, **options)
    judged_late(clipper, waits)
    return p, clipper, torch.optim.AdamW([p], 0.1, fused=fused)


def grad(step, spike):
    return torch.tensor([3.0, 4.0]) * (1 + step % 3 / 10) * (100 if spike else 1)


@pytest.mark.parametrize("mode", ["skip", "raise", "propagate"])
@pytest.mark.parametrize("how", ["fold", "in place", "clip_", "waits"])
@skips.told()
def test_a_spike_never_happened(how, mode):
    ends = []
    for spike in (SPIKE, None):
        p, clipper, optimizer = job(how == "waits", fused=how != "in place", on_nonfinite=mode)
        for step in range(16):
            if step == SPIKE and spike is None:
                continue
            p.grad = grad(step, step == spike)
            before = (
                p.detach().clone(),
                [t.clone() for state in clipper._state.policies for t in state],
            )
            if how == "clip_":
                report = clipper.clip_()
                optimizer.step()
            else:
                report = clipper.step(optimizer)
            assert (
                report.skipped == (step == spike)
                and report.nonfinite == 0
                and report.culprits == ()
            )
            if step == spike:
                assert torch.equal(p, before[0]), "nothing moves"
                assert all(
                    map(
                        torch.equal,
                        before[1],
                        [t for state in clipper._state.policies for t in state],
                    )
                ), "and no state"
        ends.append(p.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)
    assert ends[0].abs().min() > 0.1, "vacuous"


@pytest.mark.parametrize("waits", [False, True])
@skips.told()
def test_a_spike_is_no_overflow(waits):
    p, clipper, optimizer = job(waits)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for step in range(12):
        p.grad = grad(step, step == SPIKE) * 1024
        assert clipper.step(optimizer, scaler=scaler).skipped == (step == SPIKE)
    assert scaler.get_scale() == 1024


@pytest.mark.parametrize("waits", [False, True])
@skips.told()
def test_a_streak_of_spikes_ends(waits):
    p, clipper, optimizer = job(waits, skip_limit=3)
    for step in range(12):
        p.grad = grad(step, step >= SPIKE)
        assert clipper.step(optimizer).skipped == (step >= SPIKE)
    if waits:
        clipper.step(optimizer)
    with pytest.raises(distclip.GradientError) as error:
        clipper.step(optimizer)
    assert str(error.value) == (
        "step 13: 4 steps in a row were not taken (skip_limit=3), the last ones because the policy "
        "left them out: the norm stays above "
        "what it expects. Lower the learning rate, look at the data, or let the policy admit "
        "larger norms"
    )
