"""Where reading a number makes the host wait (CUDA), a step is judged exactly one call late, alike
on all ranks.

The CPU stands in for such a device: the same code, told that it may wait.
"""

import json
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import distclip
from distclip.decide.global_norms import read_norms
from distclip.decide.guard import StepVerdict, is_fine, verdict_of
from distclip.exchange.message import MessageLayout
from distclip.exchange.readback import Readback
from late import judged_late
from parity.layouts import given

WATCH = distclip.Watch(distclip.per_parameter())


def waiting(params, **options):
    return judged_late(distclip.GradClipper(params, **{"max_norm": 1.0} | options))


def refusal(call):
    try:
        call()
    except distclip.DistclipError as error:
        return f"{type(error).__name__}: {error}"
    return None


def drifting(fault):
    name, p = given("w", 40)
    optimizer = torch.optim.AdamW([p], 0.1, fused=True)
    clipper = waiting([(name, p)])
    clipper.step(optimizer)
    start = p.detach().clone()
    if dist.get_rank() == 3:
        if fault == "drift":
            p.grad[7] += 1
        elif fault == "missing":
            p.grad = None
        elif fault == "shape":
            p.grad = None
            p.data = torch.zeros(3)
            p.grad = torch.ones(3)
    now = refusal(lambda: clipper.step(optimizer))
    stood = p.shape != start.shape or torch.equal(p, start)
    _, healthy = given("w", 40)
    p.data, p.grad = start.clone(), healthy.grad
    return now, stood, refusal(lambda: clipper.step(optimizer))


@pytest.mark.parametrize(
    "fault, words",
    [
        (
            "drift",
            "AgreementError: step 2: gradients that should be copies are not equal:\nw: norm",
        ),
        (
            "missing",
            "AgreementError: step 2: gradients that should be copies are not equal:\nw: norm",
        ),
        (
            "shape",
            "GradientError: step 2: rank 3: the gradient of w has local shape (3,), the plan "
            "says (40,) (whole)",
        ),
    ],
)
def test_a_fault_stops_the_step_and_is_told_at_the_next_call(ranks, fault, words):
    rows = ranks.run(drifting, fault)
    for now, stood, later in rows:
        assert now is None and stood and later.startswith(words), later
    assert len({later for *_, later in rows}) == 1


def overflowing(folder):
    name, p = given("w", 8)
    grad = p.grad.clone()
    optimizer, log = torch.optim.AdamW([p], 0.1, fused=True), f"{folder}/log.jsonl"
    clipper = waiting([(name, p)], sinks=[distclip.JSONLSink(log)], skip_limit=2)
    moved, skipped, texts = [], [], []
    for bad in (False, True, False, True, True, True, False):
        before = p.detach().clone()
        p.grad = grad.clone()
        if bad and dist.get_rank() == 2:
            p.grad[3] = math.nan
        texts.append(refusal(lambda: skipped.append(bool(clipper.step(optimizer).skipped))))
        moved.append(not torch.equal(p, before))
    return moved, skipped, texts


def test_a_streak_ends_one_call_late(ranks, tmp_path):
    rows = ranks.run(overflowing, str(tmp_path))
    for moved, skipped, texts in rows:
        assert moved == [True, False, True, False, False, False, False]
        assert skipped == [False, True, False, True, True, True]
        assert texts[:6] == [None] * 6 and texts[6].startswith(
            "NonFiniteError: step 6: 1 gradient tensor is not finite in 3 steps in a row "
            "(skip_limit=2): w on rank 2: NaN."
        )
    _, *lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["culprits"] for line in lines] == [[], culprit(), [], culprit(), [], culprit()], (
        "found when judged, in the line of their step"
    )


def culprit():
    return [{"parameter": "w", "rank": 2, "kind": "NaN", "before": None, "after": None}]


def test_the_last_report_is_written_when_the_clipper_goes(tmp_path):
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    clipper = waiting([("w", p)], sinks=[distclip.JSONLSink(tmp_path / "log")])
    clipper.step(torch.optim.SGD([p], 1.0, fused=True))
    assert not (tmp_path / "log").exists()
    del clipper
    assert '"total_norm": 5.0' in (tmp_path / "log").read_text()


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        ), "the host reads a value"
        return func(*args, **(kwargs or {}))


def spiking_and_drifting():
    """One replica is spoilt: a spike for the policy, and a drift that is told at the next call."""
    name, p = given("w", 40)
    start = p.grad.clone()
    optimizer = torch.optim.SGD([p], 0.1, fused=True)
    clipper = waiting(
        [(name, p)],
        max_norm=None,
        policy=distclip.SkipSpikes(distclip.FixedNorm(1e9), warmup=4, window=8),
        on_nonfinite="propagate",
    )
    for _ in range(8):
        p.grad = start.clone()
        clipper.step(optimizer)
    before, p.grad = p.detach().clone(), start.clone()
    if dist.get_rank() == 1:
        p.grad[3] += 1e5
    skipped = bool(clipper.step(optimizer).skipped)
    return skipped, torch.equal(p, before), refusal(lambda: clipper.step(optimizer))


def test_a_policy_leaves_a_drifted_step_out_too(ranks):
    for skipped, stood, later in ranks.run(spiking_and_drifting):
        assert (
            skipped
            and stood
            and later.startswith(
                "AgreementError: step 9: gradients that should be copies are not equal"
            )
        )


def clipped_and_drifting():
    name, p = given("w", 40)
    clipper = waiting([(name, p)], max_norm=0.1, on_nonfinite="propagate")
    if dist.get_rank() == 1:
        p.grad[3] += 1e5
    before = p.grad.clone()
    report = clipper.clip_()
    return bool(report.clipped), torch.equal(p.grad, before), float(report.clip_rate)


def test_what_was_clipped_is_said_to_be(ranks):
    assert ranks.run(clipped_and_drifting) == [(True, False, 1.0)] * 4


def clipped_beside_a_fault(policy):
    """The last rank cannot measure, which is told at the next call; this step is taken."""
    model = nn.Linear(3, 2)
    clipper = waiting(model, max_norm=None, policy=policy, on_nonfinite="propagate")
    for p in model.parameters():
        p.grad = torch.linspace(1, 2, p.numel()).view_as(p)
    if dist.get_rank() == 3:
        model.register_parameter("joined", nn.Parameter(torch.ones(2)))
        model.joined.grad = torch.ones(2)
    clipper.clip_(grad_scale=0.5)
    grads = torch.cat([model.weight.grad.flatten(), model.bias.grad]).tolist()
    return grads, refusal(clipper.clip_)


@pytest.mark.parametrize("policy", [distclip.Normalize(0.1), distclip.FixedValue(0.01)], ids=repr)
def test_a_rank_that_cannot_measure_clips_as_the_others(ranks, policy):
    found = ranks.run(clipped_beside_a_fault, policy)
    assert {tuple(grads) for grads, _ in found} == {tuple(found[0][0])}
    assert max(found[0][0]) < 0.4, "vacuous: nothing was clipped"
    for _, later in found:
        assert "GradientError: step 1: rank 3: joined joined the model after" in later


def test_units_that_could_not_be_measured_are_left_at_their_scale():
    model = nn.Linear(3, 2)
    clipper = waiting(model, max_norm=None, policy=distclip.AGC(0.01), on_nonfinite="propagate")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.register_parameter("joined", nn.Parameter(torch.ones(2)))
    model.joined.grad = torch.ones(2)
    clipper.clip_(grad_scale=0.5)
    assert model.weight.grad.eq(0.5).all() and model.bias.grad.eq(0.5).all()
    assert "joined joined the model after" in refusal(clipper.clip_)


@pytest.mark.parametrize("mode", ["skip", "raise"])
def test_a_clip_reads_once(mode, monkeypatch):
    p = nn.Parameter(torch.zeros(2))
    clipper, reads, now = waiting([("w", p)], on_nonfinite=mode), [], Readback.read_now
    for _ in range(3):
        p.grad = torch.tensor([3.0, 4.0])
        with NoHostReads() as guard:

            def allowed(vector, guard=guard):
                reads.append(vector.numel())
                guard.__exit__(None, None, None)
                try:
                    return now(vector)
                finally:
                    guard.__enter__()

            monkeypatch.setattr(Readback, "read_now", staticmethod(allowed))
            clipper.decide()
    assert len(reads) == 3 and float(clipper.last_report.total_norm) == 5.0


@pytest.mark.parametrize("scaler", [False, True])
def test_a_folded_step_reads_nothing(scaler):
    """Up to the optimizer's own kernels, which a pre-hook precedes; `measure` reads nothing at
    all."""
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    scale = torch.amp.GradScaler("cpu", init_scale=1.0)
    scale.scale(torch.ones(()))
    optimizer, clipper = torch.optim.AdamW([p], 1.0, fused=True), waiting([("w", p)])
    reached = []
    optimizer.register_step_pre_hook(lambda *_: reached.append(guard.__exit__(None, None, None)))
    for _ in range(2):
        guard = NoHostReads()
        guard.__enter__()
        clipper.step(optimizer, scaler=scale if scaler else None, update_scaler=False)
        scale.update(1.0)
    assert len(reached) == 2


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_the_rules_are_the_same_over_floats_and_tensors(p):
    one = torch.zeros(1, dtype=torch.int64)

    def layout(on_host):
        return MessageLayout(
            p, 1, 0, 0, 4, torch.ones(1), torch.ones(1), one, one[:0], torch.ones(1), on_host
        )

    def norms(layout, message):
        return read_norms(message, layout, None, None, None, (), 24)

    good = (
        [4.0, 1.0, 0.0, 0.0, 0.0, *(5.0,) * 3, *(-5.0,) * 3]
        if math.isinf(p)
        else [4.0, 0, 0, 4.0, 0, 0, 0, *(20.0,) * 3, *(100.0,) * 3]
    )
    verdicts = set()
    for i in range(-1, len(good)):
        for value in (1.0, -1.0, 1e-7, 1e-3, math.inf, math.nan):
            message = list(good)
            if i >= 0:
                message[i] = value if i < len(good) - 6 else good[i] + 1
            if i == 0 and (value < 0 or (math.isnan(value) and math.isinf(p))):
                continue  # sums are not negative, and NaN is sent as inf
            verdict = verdict_of(norms(layout(True), message), 1e-5)
            verdicts.add(verdict)
            told = torch.tensor(message, dtype=torch.float64)
            fine = is_fine(norms(layout(False), told), 1e-5)
            assert bool(fine) == (verdict is StepVerdict.FINE), (i, value, verdict)
    assert len(verdicts) == (4 if math.isinf(p) else 6), verdicts


@pytest.mark.parametrize("late", [True, "device"])
@pytest.mark.parametrize("call", ["step", "clip_"])
@pytest.mark.parametrize("policy", [distclip.FixedNorm(2.0), distclip.AutoClip(60.0, window=4)])
def test_a_report_says_the_same_whenever_it_is_read(policy, call, late):
    """Later steps write to the counters and to the policy's state."""
    read = {}
    for at_once in (True, False):
        p = nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([p], 0.1, fused=True)
        clipper = judged_late(distclip.GradClipper([("w", p)], policy=policy, watch=WATCH), late)
        reports = []
        for step in range(8):
            p.grad = torch.tensor([3.0, 4.0]) * (step % 3 + 0.1)
            report = getattr(clipper, call)(optimizer)
            reports.append(report.to_dict() if at_once else report)
        read[at_once] = reports if at_once else [report.to_dict() for report in reports]
    assert read[True] == read[False]
    assert len({line["clip_rate"] for line in read[True]}) > 2, "vacuous"
