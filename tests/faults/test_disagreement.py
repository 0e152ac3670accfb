"""Replicas that differ, gradients that only some holders have, ranks that do something else: named
and refused on all, word by word."""

import re

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from parity.layouts import given
from precision.jobs import Job, local, mlp

ADVICE = (
    "\nIf gradients were not reduced (no DistributedDataParallel or fully_shard around the model; "
    "no_sync, accumulation), wrap it, or clip after the reduction. Parameters that were added or "
    "unfrozen after DistributedDataParallel was built are not reduced by it: wrap the model anew, "
    "and call clipper.rebuild(). An optimizer "
    "that reduces gradients inside its step() comes too late: reduce them before the clip. "
    "If these are different parameters under one name (pipeline stages, experts), declare "
    "replicated_over={pattern: process group | distclip.PRIVATE}. "
    "If ranks train apart on purpose (local SGD, DiLoCo), give "
    "process_group=: the ranks that reduce their gradients together, or distclip.LOCAL. Else one "
    "replica has diverged: restore it from a checkpoint or another rank; with a GradScaler, "
    "every clip must be given it: clip_(optimizer, scaler)"
)
SAME_CALLS = (
    "ranks did not do the same; every rank must make the same calls of the clipper in "
    "the "
    "same order, and decide alike:"
)


def refusal(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def odd():
    return dist.get_rank() == 3


class Moody:
    """A policy that is equal in name only."""

    def __repr__(self):
        return "Moody()"

    def init(self, groups, device):
        return ()

    def decide(self, norms, state):
        return distclip.Scale(
            torch.full_like(norms.per_group, 0.25 if odd() else 0.5), norms.per_group
        ), state


def other_decision():
    clipper = distclip.GradClipper([given("w", 4)], policy=Moody())
    clipper.clip_()
    clipper.clip_()


def other_step():
    clipper = distclip.GradClipper([given("w", 4)], 1.0)
    if odd():
        clipper._state.step = 6  # as if resumed from another checkpoint
    clipper.clip_()


def other_grad_scale():
    """1 / tokens of this rank, not of all."""
    distclip.GradClipper([given("w", 4)], 1.0).clip_(grad_scale=0.125 if odd() else 0.25)


def no_optimizer():
    p = given("w", 4)
    optimizer = torch.optim.SGD([p[1]], 1.0)
    distclip.GradClipper([p], 1.0).step(*([] if odd() else [optimizer]))


def unscaled_on_one_rank():
    p = given("w", 4)
    optimizer, scaler = torch.optim.SGD([p[1]], 1.0), torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    if odd():
        scaler.unscale_(optimizer)
    distclip.GradClipper([p], 1.0).step(optimizer, scaler=scaler)


def a_gradient_on_some():
    name, p = given("layer7.weight", 4)
    if odd():
        p.grad = None
    distclip.GradClipper([given("w", 4), (name, p)], 1.0).clip_()


def one_replica():
    name, p = given("layer7.weight", 4)
    p.grad += torch.tensor([100.0, 0, 0, 0]) if odd() else 0
    distclip.GradClipper([given("w", 4), (name, p)], 1.0).clip_()


def no_sync():
    job = Job("ddp", "fp32")
    with job.model.no_sync():
        job.backward(0)
    job.clipper.clip_()


def steps_in_backward():
    model = DDP(mlp())

    def step_at_once(p):
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_at_once)
    clipper = distclip.GradClipper(model, 1.0)
    model(torch.ones(2, 6)).sum().backward()
    for p in model.parameters():
        p.grad = None  # DDP's reduction filled it in again
    clipper.clip_()


def norm(name):
    return f"{given(name, 4)[1].grad.double().norm().item():.9g}"


def calls(usual, other):
    return f"AgreementError: {SAME_CALLS}\nrank 0-2: {usual}, options O\nrank 3: {other}, options O"


REFUSED = {
    other_decision: lambda: calls("at step 2: clip_, after decision A", "at step 2: clip_, after "
                                                                        "decision B"),
    other_step: lambda: calls("at step 1: clip_, after decision A", "at step 7: clip_, after "
                                                                    "decision A"),
    other_grad_scale: lambda: calls(
        "at step 1: clip_ with grad_scale 0.25, after decision A", "at step 1: clip_ with "
                                                                   "grad_scale 0.125, after "
                                                                   "decision A"
    ),
    no_optimizer: lambda: calls(
        "at step 1: step with 1 optimizer, after decision A",
        "at step 1: step [step() was given no optimizer; pass those that hold the clipped "
        "parameters, or use clip_()], after decision A",
    ),
    unscaled_on_one_rank: lambda: calls(
        "at step 1: step with 1 optimizer, a scaler, after decision A",
        "at step 1: step with 1 optimizer, a scaler that unscaled optimizer 0 before, after "
        "decision A",
    ),
    a_gradient_on_some: lambda: "AgreementError: step 1: gradients that should be copies are not "
                                "equal:\nlayer7.weight: norm "
    f"{norm('layer7.weight')} on rank 0-2, no gradient on rank 3" + ADVICE,
    one_replica: lambda: "AgreementError: step 1: gradients that should be copies are not "
                         "equal:\nlayer7.weight: norm "
    f"{norm('layer7.weight')} on rank 0-2, norm "
    f"{(given('layer7.weight', 4)[1].grad + torch.tensor([100.0, 0, 0, 0])).double().norm():.9g} "
    "on rank 3" + ADVICE,
    steps_in_backward: lambda: "GradientError: step 1: rank 0-3: no parameter has a gradient, and "
                               "the hook "
    "steps_in_backward.<locals>.step_at_once of 0.weight (4 parameters have such hooks) runs as "
    "soon as a gradient is accumulated: an "
    "optimizer that steps inside backward leaves nothing to clip, and the global norm is not known "
    "yet there; step after the clip, "
    "without this hook",
}  # fmt: skip


@pytest.mark.parametrize("wrong", REFUSED, ids=lambda f: f.__name__)
def test_refused_on_all_ranks_word_by_word(ranks, wrong):
    for text in ranks.run(refusing, wrong):
        hashes = dict.fromkeys(re.findall("after decision ([0-9a-f]{4})", text))
        for letter, found in zip("AB", hashes):
            text = text.replace(f"after decision {found}", f"after decision {letter}")
        assert (
            re.sub("options [0-9a-f]{4}(, scale 65536)?", "options O", text) == REFUSED[wrong]()
        ), text


def refusing(wrong):
    return refusal(wrong)


def test_ddp_gradients_before_the_reduction_are_refused(ranks):
    said = ranks.run(refusing, no_sync)
    assert len(set(said)) == 1 and said[0].endswith(ADVICE)
    assert said[0].startswith(
        "AgreementError: step 1: gradients that should be copies are not equal:\n0.bias: norm "
    )
    assert said[0].count("on rank") == 4 * 4, "four parameters, four ranks"


# A flipped bit is refused at its step, the rounding of another reduction is not


def flipped(p, bit, at):
    name, param = given("w", 1000)
    param.grad = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    grads = param.grad.clone()
    clipper = distclip.GradClipper([(name, param)], 1.0, norm_type=p)
    whole = grads.double().abs().pow(p).sum() ** (1 / p)
    grads.view(torch.int32)[grads.abs().argsort(descending=True)[at]] ^= 1 << bit
    change = abs((grads.double().abs().pow(p).sum() ** (1 / p) / whole - 1).item())
    if dist.get_rank() == 2:
        param.grad = grads
    return change, refusal(clipper.clip_)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, 8.0])
def test_a_flipped_bit(ranks, p):
    seen = 0
    for bit, at in (
        (30, 999),
        (29, 400),
        (28, 5),
        (27, 3),
        (23, 0),
        (23, 900),
        (22, 1),
        (20, 0),
        (26, 600),
    ):
        rows = ranks.run(flipped, p, bit, at)
        change = rows[0][0]
        if change >= 1e-4:  # a flip that leaves no number is a bad step, not drift
            seen += 1
            assert all(text and "w: norm" in text and "on rank 2" in text for _, text in rows), (
                bit,
                at,
                rows,
            )
    assert seen >= 3, "vacuous"


def rounding(p):
    clipper_of = []
    for i in range(3):
        name, param = given(f"w{i}", 5000)
        param.grad = torch.randn(5000, generator=torch.Generator().manual_seed(i))
        noise = torch.randn(5000, generator=torch.Generator().manual_seed(10 * i + dist.get_rank()))
        param.grad *= 1 + 1e-6 * noise
        clipper_of.append((name, param))
    return refusal(distclip.GradClipper(clipper_of, 1.0, norm_type=p).clip_)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, 8.0])
def test_rounding_is_no_drift(ranks, p):
    assert ranks.run(rounding, p) == [None] * 4


# Accumulation


def accumulated(strategy, precision, micro_steps):
    """Four micro-batches in one backward or in four; the mean of their losses."""
    job = Job(strategy, precision, {"max_norm": 0.05})
    ends = []
    for step in range(5):
        for optimizer in job.optimizers:
            optimizer.zero_grad()
        source = torch.Generator().manual_seed(step * 10 + job.which)
        x, y = torch.randn(8, 6, generator=source), torch.randn(8, 4, generator=source)
        for i in range(micro_steps):
            part = slice(8 // micro_steps * i, 8 // micro_steps * (i + 1))
            if strategy == "fsdp2":
                job.model.set_requires_gradient_sync(i == micro_steps - 1)
            hold = (
                job.model.no_sync()
                if strategy == "ddp" and i < micro_steps - 1
                else torch.enable_grad()
            )
            with hold:
                loss = (job.model(x[part]) - y[part]).square().mean()
                (job.scaler.scale(loss) if job.scaler else loss).backward()
        report = job.clipper.step(*job.optimizers, scaler=job.scaler, grad_scale=1 / micro_steps)
        assert report.clipped
        ends.append(report.total_norm.item())
    return ends, torch.cat([local(p).detach().flatten() for p in job.model.parameters()])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_accumulation_changes_nothing(ranks, strategy, precision):
    for (norms, end), (norms4, end4) in zip(
        ranks.run(accumulated, strategy, precision, 1),
        ranks.run(accumulated, strategy, precision, 4),
    ):
        assert norms4 == pytest.approx(norms, rel=1e-5)
        torch.testing.assert_close(end4, end, rtol=1e-4, atol=1e-5)
