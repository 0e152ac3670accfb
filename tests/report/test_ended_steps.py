"""A step that ends in an error is the log's last line, and is written before the error is raised."""

import gc
import json
import logging
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
        assert (last is report) == late and clipper._state.num_steps == step - late
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
    assert [line["ended_in"] for line in lines] == [None] * (end - 1) + [error]
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
        text = page.read_text()
        assert f"step {end}" in text
        assert ("copies of gradients differed" in text) == (error == "AgreementError")
        assert ("by the policy" in text) == (how == "spikes")


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
    text = "broken failed at step 1, which ends in NonFiniteError, and is off from now on: OSError"
    assert text in caplog.text


class Leaves:
    """A sink that ends the program, or is interrupted, at a step that was not taken."""

    def __init__(self, kind, when="write"):
        self.kind, self.when = kind, when

    def begin(self, header):
        if self.when == "begin":
            raise self.kind

    def write(self, report):
        if report.skipped:
            raise self.kind("a sink's")


def when_a_sink_leaves(kind, when, late):
    """Two steps with a NaN; what each rank raises, by what context, and what a second sink got."""
    p = nn.Parameter(torch.zeros(4))
    written = []
    clipper = distclip.GradClipper(
        [("w", p)],
        1.0,
        on_nonfinite="raise",
        sinks=[Leaves(kind, when), lambda report: written.append(report.ended_in)],
    )
    judged_late(clipper, late)
    optimizer = torch.optim.SGD([p], 0.1, fused=True)
    try:
        for _ in range(2):
            p.grad = torch.full((4,), NAN)
            clipper.step(optimizer)
    except BaseException as error:
        return type(error).__name__, type(error.__context__).__name__, written
    return None


@pytest.mark.parametrize("late", [False, True, "device"])
@pytest.mark.parametrize("when", ["write", "begin"])
def test_a_sink_that_exits_does_not_hide_the_error_on_one_rank(ranks, when, late):
    answers = ranks.run(when_a_sink_leaves, SystemExit, when, late)
    assert [kind for kind, *_ in answers] == ["NonFiniteError"] * 4
    assert [written for *_, written in answers] == [["NonFiniteError"], [], [], []]


@pytest.mark.parametrize("late", [False, True, "device"])
def test_an_interrupt_in_a_sink_is_raised_and_shows_the_error(ranks, late):
    first, *others = ranks.run(when_a_sink_leaves, KeyboardInterrupt, "write", late)
    assert first == ("KeyboardInterrupt", "NonFiniteError", [])
    assert [kind for kind, *_ in others] == ["NonFiniteError"] * 3


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_a_sink_may_exit_at_a_step_that_goes_on(kind):
    p = nn.Parameter(torch.zeros(4))
    clipper = distclip.GradClipper([("w", p)], 1.0, sinks=[Leaves(kind)])
    p.grad = torch.full((4,), NAN)
    with pytest.raises(kind, match="a sink's"):
        clipper.clip_()


def differing_copies():
    """Of each rank another gradient: what LoggingSink says of the step."""
    p = nn.Parameter(torch.zeros(4))
    said = []
    logger = logging.Logger("apart")
    logger.addFilter(lambda record: said.append(record.getMessage()))
    clipper = distclip.GradClipper([("w", p)], 1.0, sinks=[distclip.LoggingSink(logger)])
    p.grad = torch.full((4,), 1.0 + dist.get_rank())
    with pytest.raises(distclip.AgreementError):
        clipper.clip_()
    return said


def test_no_policy_is_blamed_for_copies_that_differ(ranks):
    norm = 2 * math.sqrt((1 + 4 + 9 + 16) / 4)
    text = f"step 1 skipped: copies of gradients differ, which is an error: norm {norm:.6g}"
    assert ranks.run(differing_copies) == [[text], [], [], []]


def after_caught_errors(late):
    """Three bad steps that raise and are caught, then a good one: skips as reports, log and
    checkpoint have them."""
    p = nn.Parameter(torch.zeros(4))
    reports = []
    clipper = distclip.GradClipper([("w", p)], 1.0, on_nonfinite="raise", sinks=[reports.append])
    judged_late(clipper, late)
    optimizer = torch.optim.SGD([p], 0.1, fused=True)
    caught = 0
    for value in (1.0, NAN, NAN, NAN, 1.0, 1.0, 1.0):
        p.grad = torch.full((4,), value)
        try:
            report = clipper.step(optimizer)
        except distclip.NonFiniteError:
            caught += 1
    saved = clipper.state_dict()
    clipper.load_state_dict(saved)
    p.grad = torch.ones(4)
    after = clipper.step(optimizer)
    clipper._writer.flush()
    skips = [int(each.skips) for each in reports]
    return caught, skips, int(report.skips), int(saved["history.skips"]), int(after.skips)


@pytest.mark.parametrize("late", [False, True, "device"])
def test_skips_that_raised_are_counted_when_training_goes_on(ranks, late):
    answers = ranks.run(after_caught_errors, late)
    # judged late, the call that raises does nothing of its own: the third NaN never came
    num = 2 if late else 3
    for caught, _, *skips in answers:
        assert caught == num and skips == [num] * 3
    written = answers[0][1]
    assert written == sorted(written) and written[-1] == num


KINDS = {
    "good": None,
    "clipped": None,
    "spike": None,
    "NaN": "NonFiniteError",
    "copies differ": "AgreementError",
    "joined": "GradientError",
    "a parameter for a note": "ConfigError",
}


def what_a_clipper_remembers(late):
    """Steps of all kinds, each error caught. A call that tells of the one before does nothing of
    its own, and is made again."""
    model = nn.Linear(3, 2)
    given = [torch.ones_like(p) for p in model.parameters()]
    sinks = [lambda _: None] if dist.get_rank() == 0 else [None]
    policy = distclip.Escalate(distclip.FixedNorm(4.0), history=4, warmup=2, lower_lr=5, window=9)
    clipper = distclip.GradClipper(model, policy=policy, on_nonfinite="raise", sinks=sinks)
    judged_late(clipper, late)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, fused=True)
    odd = dist.get_rank() == 2
    caught = []

    def call(kind):
        by = {"clipped": 1.8, "spike": 400.0, "NaN": NAN}.get(kind, 1.0)
        by = 3.0 if kind == "copies differ" and odd else by
        for p, whole in zip(model.parameters(), given, strict=True):
            p.grad = whole * by
        if kind == "joined" and odd:
            model.more = nn.Parameter(torch.ones(1))
            model.more.grad = torch.ones(1)
        try:
            clipper.step(optimizer, note=model.bias if kind == "a parameter for a note" else None)
        finally:
            if hasattr(model, "more"):
                del model.more

    good = ["good"] * 3
    for kind in [*good, *KINDS, *good, "NaN", "joined", "clipped", "copies differ", "good"]:
        while True:
            try:
                call(kind)
            except distclip.DistclipError as error:
                caught.append(type(error).__name__)
                if late and not isinstance(error, distclip.ConfigError):
                    continue
            break
    clipper.measure()  # the last step is judged
    return caught, clipper.state_dict(), clipper._state.num_steps


def test_both_timings_remember_the_same_of_steps_that_ended(ranks):
    now, late = (ranks.run(what_a_clipper_remembers, late) for late in (False, True))
    wanted = [error for error in KINDS.values() if error]
    wanted += ["NonFiniteError", "GradientError", "AgreementError"]
    for caught, state, num_steps in now + late:
        assert caught == wanted
        assert state.keys() == now[0][1].keys() and num_steps == now[0][2] == 18
        for name, value in now[0][1].items():
            same = torch.equal if isinstance(value, torch.Tensor) else str.__eq__
            assert same(state[name], value), name
    state = now[0][1]
    assert int(state["history.calls"]) == 18 and state["history.clipped"].sum() == 2
    assert int(state["history.skips"]) == len(wanted) + 1, "and the spike"


def test_a_skip_that_cannot_be_carried_out_is_in_the_log():
    """`grad_of` finds gradients that `clip_` cannot take away."""
    p, elsewhere, reports = nn.Parameter(torch.zeros(2)), torch.full((2,), NAN), []
    sinks = [reports.append, Leaves(SystemExit)]
    clipper = distclip.GradClipper([("w", p)], 1.0, grad_of=lambda _: elsewhere, sinks=sinks)
    with pytest.raises(distclip.GradientError, match="step 1 is to be skipped"):
        clipper.clip_()
    (report,) = reports
    assert report is clipper.last_report and report.skipped and report.culprits[0].kind == "NaN"
    assert report.ended_in == "GradientError"


def fate_of(what, late):
    """Whether the error lives on once it is caught, with what its frames hold."""
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 1.0 + dist.get_rank())
    clipper = judged_late(distclip.GradClipper([("w", p)], 1.0), late)
    optimizer = torch.optim.SGD([p], 0.1, fused=True)
    call = {"step": lambda: clipper.step(optimizer)}.get(what) or getattr(clipper, what)
    fate = None
    gc.collect()
    gc.disable()
    try:
        try:
            call()
            call()
        except distclip.AgreementError as error:
            fate = weakref.ref(error)
        return fate is not None and fate() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("late", [False, True, "device"])
@pytest.mark.parametrize("what", ["step", "clip_", "measure", "audit"])
def test_a_caught_error_goes_at_once(ranks, what, late):
    assert ranks.run(fate_of, what, late) == [True] * 4


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


def held_by_an_error_of_copies(what, late):
    """Whether a gradient lives on while the error is kept."""
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 1.0 + dist.get_rank())
    clipper = judged_late(distclip.GradClipper([("w", p)], 1.0), late)
    grad, kept = weakref.ref(p.grad), None
    gc.collect()
    gc.disable()
    try:
        try:
            getattr(clipper, what)()
            getattr(clipper, what)()
        except distclip.AgreementError as error:
            kept = error
        p.grad = None
        return type(kept).__name__, grad() is not None
    finally:
        gc.enable()


@pytest.mark.parametrize("late", [False, True, "device"])
@pytest.mark.parametrize("what", ["clip_", "measure", "audit"])
def test_gradients_do_not_live_on_in_an_error_of_copies_that_is_kept(ranks, what, late):
    assert ranks.run(held_by_an_error_of_copies, what, late) == [("AgreementError", False)] * 4


@pytest.mark.parametrize("late", [False, True, "device"])
def test_gradients_do_not_live_on_in_an_error_that_is_kept(late):
    """Of a call that could not measure."""
    model = nn.Linear(3, 2)
    clipper = judged_late(distclip.GradClipper(model, 1.0), late)
    model(torch.ones(3)).sum().backward()
    grad = weakref.ref(model.weight.grad)
    model.register_parameter("joined", nn.Parameter(torch.ones(2)))
    model.joined.grad = torch.ones(2)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(distclip.GradientError, match="joined joined the model after") as kept:
            clipper.clip_()
        model.zero_grad()
        assert grad() is None, kept
    finally:
        gc.enable()
