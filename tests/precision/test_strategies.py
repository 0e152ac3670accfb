"""Every strategy and precision: a hundred steps, of which some go wrong on one rank, end as if
those had never happened."""

import pytest
import torch

import skips
from precision.jobs import BAD, STRATEGIES, Job

STEPS = 100


@skips.told()
def interrupted(strategy, precision):
    """Which steps were skipped, the scale before each step, and the end."""
    job, skipped, scales, clipped = Job(strategy, precision), [], [], 0
    for step in range(STEPS):
        job.backward(step, BAD.get(step))
        scales.append(job.scaler.get_scale() if job.scaler else None)
        report = job.step()
        clipped += int(report.clipped)
        if report.skipped:
            skipped.append(step)
    scaler = str(job.scaler.state_dict()) if job.scaler else None
    return skipped, scales, clipped, job.state(), job.replicated(), scaler, job.sharing


def uninterrupted(strategy, precision, scales):
    """The bad steps are not taken, by leaving them out. Their backward runs unspoilt: DDP adds in
    another order after its first one."""
    job = Job(strategy, precision)
    for step in range(STEPS):
        if job.scaler:
            job.scaler.scale(torch.ones(()))  # the first call makes the scaler's tensors
            job.scaler.update(scales[step])
        job.backward(step)
        if step not in BAD:
            job.step()
    return job.state()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bad_steps_never_happened(ranks, strategy, precision):
    rows = ranks.run(interrupted, strategy, precision)
    for skipped, _, clipped, *_ in rows:
        assert skipped == list(BAD), "each bad step, and no other, is skipped on every rank"
        assert clipped > STEPS / 2, "vacuous"
    _, scales, _, states, replicated, scalers, sharing = zip(*rows)
    assert len(set(scalers)) == 1 and len(set(map(str, scales))) == 1
    assert len(set(replicated)) == 1
    for together in sharing[0]:
        assert len({states[rank] for rank in together}) == 1
    assert ranks.run(uninterrupted, strategy, precision, scales[0]) == list(states)
