"""A step that ends in an error is the log's last line, and is written before the error is raised."""

import gc
import json
import math
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip.cli import main
from distclip.cli.log_reader import read_runs
from distclip.testing import count_collectives
from late import judged_late
from parity.layouts import given
from parity.oracle import total_norm

NAN = math.nan
# What the last steps' gradients of rank 2 and of the others are multiplied by, the options, and the
# error. The first four are sound.
ENDS = {
    "raise": ([(NAN, 1)], {"on_nonfinite": "raise"}, "NonFiniteError"),
    "skip limit": ([(NAN, 1)] * 2, {"skip_limit": 1}, "NonFiniteError"),
    "spikes": (
        [(40, 40)] * 2,
        {
            "policy": distclip.Escalate(distclip.FixedNorm(5.0), history=4, warmup=2),
            "skip_limit": 1,
        },
        "GradientError",
    ),
    "drift": ([(3, 1)], {}, "AgreementError"),
    "on some ranks": ([(None, 1)], {}, "AgreementError"),
}
SOUND = 4


def until_it_ends(how, late, path):
    """The error, what the log has when it is raised, this rank's last report, and messages."""
    factors, options, _ = ENDS[how]
    named = [given("first.w", 40), given("second.w", 30)]
    wholes = [p.grad.clone() for _, p in named]
    params = [p for _, p in named]
    optimizer = torch.optim.SGD(params, 1e-3, fused=True)
    options = ({} if "policy" in options else {"max_norm": 5.0}) | options
    sinks = [distclip.JSONLSink(path)] if dist.get_rank() == 0 else [None]
    watch = distclip.Watch(distclip.per_layer(), every=1000)
    clipper = judged_late(distclip.GradClipper(named, sinks=sinks, watch=watch, **options), late)
    names, start, report = [], [], None
    try:
        for step, (odd, others) in enumerate([(1, 1)] * SOUND + factors + [(1, 1)] * late, 1):
            by = odd if dist.get_rank() == 2 else others
            for p, whole in zip(params, wholes, strict=True):
                p.grad = None if by is None else whole * by
            start = [p.detach().clone() for p in params]
            with count_collectives() as seen:
                report = clipper.step(optimizer, note=f"step {step}")
            names.append(seen.names)
    except distclip.DistclipError as error:
        stood = all(map(torch.equal, start, params))
        dist.barrier()  # the first rank has written
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        last = clipper.last_report
        assert (last is report) == late and clipper._state.num_steps == step - 1
        numbers = last.packed().tolist(), last.step, last.skipped.item(), int(last.skips)
        return type(error).__name__, stood, lines[1:], numbers, names, len(gone(clipper))
    raise AssertionError("no error")


def gone(clipper):
    """What is left to be written."""
    left = clipper._writer._late.dequeue()
    return [] if left is None else [left]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("how", ENDS)
def test_the_step_that_ends_the_run_is_in_the_log(ranks, tmp_path, how, late):
    factors, _, error = ENDS[how]
    path = tmp_path / "run.jsonl"
    answers = ranks.run(until_it_ends, how, late, str(path))
    end = SOUND + len(factors)
    wholes = [given("first.w", 40)[1].grad, given("second.w", 30)[1].grad]
    for kind, stood, lines, numbers, names, left in answers:
        assert kind == error and stood and left == 0
        assert str(numbers) == str(answers[0][3]), "all ranks know the same of it"
        assert numbers[1:] == (end, True, len(factors))
        assert names[:SOUND] == [["allreduce_"]] * SOUND
        assert [line["step"] for line in lines] == list(range(1, end + 1))
    last = lines[-1]
    assert last["skipped"] and last["matters"] == "skipped" and not last["clipped"]
    assert last["layers"] == ["first", "second"] and last["coefs"] == [0.0]
    said = [note["note"] for note in last["notes"] if note["step"] == end]
    assert said == [f"step {end}"] * 4, "notes of all ranks"
    odd, others = factors[-1]
    if odd != odd:
        assert last["total_norm"] is None and last["nonfinite"] == 2
        assert [c["rank"] for c in last["culprits"]] == [2, 2]
    else:
        copies = [0 if odd is None else odd, *[others] * 3]
        mean = math.sqrt(sum(copy**2 for copy in copies) / 4)
        assert last["total_norm"] == pytest.approx(mean * total_norm(wholes), rel=1e-6)
        assert last["nonfinite"] == 0 and last["norm_after"] == 0.0
    assert not any(line["skipped"] for line in lines[:SOUND]), "vacuous"
    (run,), left_out = read_runs([str(path)])
    assert run.step[-1] == end and run.skipped[-1] and not (run.notes or left_out)
    if not late:
        page = tmp_path / "page.html"
        assert main(["report", str(path), "--output", str(page)]) == 0
        assert f"step {end}" in page.read_text()


def test_an_error_of_which_nothing_was_measured_writes_no_line():
    """Where the sums that came back are not the gradients', a line would say what is not so."""
    model, reports = nn.Linear(3, 2), []
    clipper = distclip.GradClipper(model, 1.0, sinks=[reports.append])
    model(torch.ones(3)).sum().backward()
    first = clipper.clip_()
    model.weight = nn.Parameter(torch.ones(2, 3))
    model(torch.ones(3)).sum().backward()
    with pytest.raises(distclip.GradientError):
        clipper.clip_()
    assert reports == [first] and clipper.last_report is first


def test_a_sink_that_fails_does_not_hide_the_error(caplog):
    model = nn.Linear(3, 2)

    def broken(report):
        raise OSError("disk full")

    clipper = distclip.GradClipper(model, 1.0, on_nonfinite="raise", sinks=[broken])
    model(torch.full((3,), NAN)).sum().backward()
    with pytest.raises(distclip.NonFiniteError, match="step 1: 1 gradient tensor is not finite"):
        clipper.clip_()
    assert "broken failed at step 1" in caplog.text


def test_nothing_of_the_step_lives_on_in_the_error():
    """The gradients go with the last name of them, not with the collector's next round."""
    model = nn.Linear(3, 2)
    clipper = distclip.GradClipper(model, 1.0, on_nonfinite="raise")
    model(torch.full((3,), NAN)).sum().backward()
    grad = weakref.ref(model.weight.grad)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(distclip.NonFiniteError):
            clipper.clip_()
        model.zero_grad()
        assert grad() is None
    finally:
        gc.enable()
