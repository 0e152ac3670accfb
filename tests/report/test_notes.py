"""Notes: this rank's own words about a step, of all ranks where the step matters, and nowhere
else."""

import gc
import json
import math
from pathlib import Path
from unittest.mock import patch
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distclip
import skips
from distclip.step import DeviceLate, StepRunner
from distclip.testing import count_collectives
from late import judged_late
from parity.layouts import given

INF, NAN = math.inf, math.nan
QUIET = [1.0, 1.1, 0.9, 1.05] * 5


def noted(late, folder, call):
    """Twenty quiet steps, a spike at step 21, a quiet one, a step with inf on rank 2, a quiet one.

    Ranks 0 and 3 give a note at each step, rank 1 at step 20 alone, rank 2 none.
    """
    rank = dist.get_rank()
    name, p = given("w", 8)
    grad = p.grad / p.grad.norm()
    path = f"{folder}/{late}-{call}.jsonl"
    clipper = judged_late(
        distclip.GradClipper([(name, p)], 10.0, sinks=[distclip.JSONLSink(path)]), late
    )
    optimizer = torch.optim.AdamW([p], 1e-3, fused=True)
    messages, told = [], []
    for step, norm in enumerate([*QUIET, 50.0, 1.0, INF, 1.0], 1):
        p.grad = grad * (1.0 if norm == INF else norm)
        if norm == INF and rank == 2:
            p.grad[3] = INF
        note = {"ids": [10 * step, rank]} if rank in (0, 3) else None
        if rank == 1 and step == 20:
            note = "the last of its file"
        with count_collectives() as seen:
            if call == "step":
                report = clipper.step(optimizer, note=note)
            elif call == "clip_":
                report = clipper.clip_(note=note)
            else:
                report = clipper.decide(note=note)
        messages.append(len(seen.names))
        told.append((report.matters, report.notes))
    clipper._writer.flush()
    return messages, told


@pytest.mark.parametrize(
    "late, call", [(False, "step"), (True, "step"), (False, "clip_"), (False, "decide")]
)
def test_all_ranks_notes_stand_at_the_steps_that_matter(ranks, tmp_path, late, call):
    said = ranks.run(noted, late, str(tmp_path), call)
    path = tmp_path / f"{late}-{call}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()][1:]
    kinds = {row["step"]: row["matters"] for row in rows if row["matters"] is not None}
    assert kinds[21] == "outlier" and kinds[23] == "skipped"
    quiet = [row["step"] for row in rows if row["matters"] is None]
    assert len(quiet) > 15 and all(not rows[step - 1]["notes"] for step in quiet)
    shown = {row["step"]: row["notes"] for row in rows}

    def of(rank, *steps):
        return [
            {"rank": rank, "step": step, "note": {"ids": [10 * step, rank]}, "cut": False}
            for step in steps
        ]

    before = max([step for step in kinds if step < 21], default=0)
    since = [step for step in (19, 20, 21) if step > before]
    file = {"rank": 1, "step": 20, "note": "the last of its file", "cut": False}
    assert shown[21] == [*of(0, *since), *([file] if before < 20 else []), *of(3, *since)]
    since = [22, 23] if 22 not in kinds else [23]
    assert shown[23] == [*of(0, *since), *of(3, *since)], "each is sent once"
    # one gather, of two messages: sizes and texts; the search for culprits is another, and in late
    # mode both come with the next call
    for messages, told in said:
        for step in range(1, 25):
            judged = step - late
            more = 2 * (judged in kinds) + 2 * (judged == 23)
            assert messages[step - 1] == 1 + more, (step, messages)
        assert told == said[0][1], "the same on every rank"
        if late:
            assert told == [(None, ())] * 24
        else:
            assert [bool(notes) for _, notes in told] == [bool(shown[i]) for i in range(1, 25)]


def without_notes():
    name, p = given("w", 8)
    grad = p.grad / p.grad.norm()
    clipper = distclip.GradClipper([(name, p)], 10.0)
    matters, messages = [], []
    for norm in [*QUIET, 50.0]:
        p.grad = grad * norm
        with count_collectives() as seen:
            matters.append(clipper.clip_().matters)
        messages.append(len(seen.names))
    return matters[-1], set(messages)


def test_nothing_is_gathered_where_no_rank_has_a_note(ranks):
    assert ranks.run(without_notes) == [("outlier", {1})] * 4


def alone(*notes):
    """One process: the notes of the last step, which is skipped."""
    p = nn.Parameter(torch.zeros(1))
    clipper = distclip.GradClipper([("w", p)], 1.0)
    with skips.told():
        for i, note in enumerate(notes, 1):
            p.grad = torch.tensor([NAN if i == len(notes) else 1.0])
            report = clipper.clip_(note=note)
    return [tuple(note) for note in report.notes]


def test_a_note_is_what_it_was_when_it_was_given():
    ids = [1, 2]
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.tensor([1.0])
    clipper = distclip.GradClipper([("w", p)], 1.0)
    clipper.clip_(note=ids)
    ids.append(3)
    p.grad = torch.tensor([NAN])
    with skips.told():
        assert clipper.clip_().notes == (distclip.Note(0, 1, [1, 2], False),)


def test_the_last_three_steps_are_kept():
    assert alone("a", "b", "c", "d", "e") == [(0, i, "cde"[i - 3], False) for i in (3, 4, 5)]
    assert alone("a", "b", None, None) == [(0, 2, "b", False)]
    assert alone("a", None, None, None) == []


def test_notes_of_steps_that_are_taken_back_are_not_sent():
    """Steps 3 to 6 will be others once the checkpoint of step 2 is loaded."""
    p = nn.Parameter(torch.zeros(1))
    clipper = distclip.GradClipper([("w", p)], 1.0)
    for step in range(1, 7):
        p.grad = torch.tensor([1.0])
        clipper.clip_(note=step)
        if step == 2:
            saved = clipper.state_dict()
    clipper.load_state_dict(saved)
    p.grad = torch.tensor([NAN])
    with skips.told():
        report = clipper.clip_(note="another")
    assert (report.step, report.matters) == (3, "skipped")
    assert report.notes == (distclip.Note(0, 3, "another", False),)


def test_what_is_too_long_is_cut_and_says_so():
    (row,) = alone("x" * 10_000)
    assert row == (0, 1, '"' + "x" * 4095, True)
    older, latest = alone("y" * 10, "z" * 4090)
    assert latest == (0, 2, "z" * 4090, False)
    assert older == (0, 1, '"yyy', True), "4 KiB in all, and the latest first"
    assert alone("y", "z" * 4094) == [(0, 2, "z" * 4094, False)]
    (row,) = alone("ä" * 4096)
    assert row[3] and row[2] == ('"' + "\\u00e4" * 4096)[:4096], "of its JSON, in ASCII"


def test_any_json_comes_back(tmp_path):
    note = {
        "loss": NAN,
        "ids": [1, 2.5, True, None],
        "name\t\n": "\u2028 \U0001f600 \ud800",
        "": {},
    }
    ((_, _, back, cut),) = alone(note)
    assert (
        math.isnan(back.pop("loss"))
        and not cut
        and back == {k: note[k] for k in note if k != "loss"}
    )
    path = tmp_path / "log.jsonl"
    p = nn.Parameter(torch.zeros(1))
    clipper = distclip.GradClipper([("w", p)], 1.0, sinks=[distclip.JSONLSink(path)])
    p.grad = torch.tensor([NAN])
    clipper.clip_(note=note)
    row = json.loads(path.read_text().splitlines()[1])
    assert row["notes"][0]["note"] == note | {"loss": None}


class Odd(dict):
    def items(self):
        raise OSError("gone")


def refused(bad_ranks, note, call):
    """What a bad note on some ranks makes of the call, and of the next one."""
    name, p = given("w", 8)
    before = p.grad.clone()
    clipper = distclip.GradClipper([(name, p)], 0.1)
    mine = note if dist.get_rank() in bad_ranks else 1
    said = None
    try:
        if call == "clip_":
            clipper.clip_(note=mine)
        else:
            clipper.step(torch.optim.SGD([p], 1.0), note=mine)
    except distclip.DistclipError as error:
        said = type(error).__name__, str(error)
    untouched = torch.equal(p.grad, before)
    return said, untouched, float(clipper.clip_(note=1).total_norm)


NO_JSON = {
    "tensor": lambda: torch.ones(2),
    "set": lambda: {1, 2},
    "tuple keys": lambda: {(1, 2): 3},
    "circular": lambda: circular(),
    "gone": lambda: Odd(a=1),
}


def circular():
    note = []
    note.append(note)
    return note


def refused_of(bad_ranks, kind, call):
    return refused(bad_ranks, NO_JSON[kind](), call)


@pytest.mark.parametrize("kind", NO_JSON)
def test_what_is_no_json_is_refused_on_all_ranks(ranks, kind):
    for said, untouched, norm in ranks.run(refused_of, [0, 1, 2, 3], kind, "clip_"):
        assert said is not None and said[0] == "ConfigError", said
        assert kind == "gone" or said[1].startswith("clip_(note=...): "), said
        assert untouched and norm > 0
    for said, untouched, norm in ranks.run(refused_of, [2], kind, "step"):
        assert said is not None and said[0] in ("AgreementError", "ConfigError"), said
        assert untouched and norm > 0


@pytest.mark.parametrize("path", [Path(__file__)])
def test_a_path_is_refused_with_what_to_do(path):
    with pytest.raises(distclip.ConfigError, match=r"A note is what JSON can write: .*loss\.item"):
        alone(path)


def test_a_captured_step_takes_no_note():
    """Its replays could not give one each. Nothing can be captured here: the runner is told so."""
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.ones(1)
    clipper = judged_late(distclip.GradClipper([("w", p)], 1.0))
    optimizer = torch.optim.SGD([p], 1.0, fused=True)
    with patch.object(StepRunner, "is_capturing", True):
        with pytest.raises(distclip.ConfigError, match=r"step\(note=\.\.\.\) inside a CUDA graph"):
            clipper.step(optimizer, note=1)
        clipper.step(optimizer)


def test_what_is_measured_in_a_capture_is_left_to_the_device():
    """Nothing can be read there; and counters that are on the host by then would have to be copied
    at each replay."""
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.ones(1)
    clipper, later = (judged_late(distclip.GradClipper([("w", p)], 1.0)) for _ in range(2))
    with patch.object(StepRunner, "is_capturing", True):
        assert isinstance(clipper.measure().__dict__["total_norm"], torch.Tensor)
    later.clip_()
    with (
        patch.object(StepRunner, "is_capturing", True),
        pytest.raises(distclip.ConfigError) as seen,
    ):
        later.measure()
    assert str(seen.value).splitlines()[0] == (
        "measure() inside a CUDA graph, and the clipper's counters are on the host: before the "
        "capture take one step() with fused optimizers, or one clip_() with "
        "on_nonfinite='propagate'"
    )


def test_what_is_captured_prepares_no_read():
    """A replay's numbers are read by nobody at the next call: packing them would be launches at
    each one."""
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.ones(1)
    clipper = judged_late(distclip.GradClipper([("w", p)], 1.0))
    optimizer, pack = torch.optim.SGD([p], 1.0, fused=True), DeviceLate._pack
    packed = []
    with patch.object(DeviceLate, "_pack", lambda *args: packed.append(1) or pack(*args)):
        with patch.object(StepRunner, "is_capturing", True):
            clipper.step(optimizer)
        assert not packed
        clipper.step(optimizer)
    assert packed, "vacuous"


def test_what_a_graph_reads_outlives_the_clipper():
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.ones(1)
    clipper = judged_late(distclip.GradClipper([("w", p)], 1.0))
    with patch.object(StepRunner, "is_capturing", True):
        clipper.step(torch.optim.SGD([p], 1.0, fused=True))
    state, layout = clipper._state, clipper._stages.layout
    read = [ref(tensor) for tensor in (layout.share, state.history.num_calls)]
    kept = ref(clipper)
    del clipper, state, layout
    gc.collect()
    assert kept() is None, "vacuous"
    assert all(tensor() is not None for tensor in read)


# What the log alone tells


def explained(path):
    """DDP of three layers on data of each rank's own: at step 25 rank 2 reads a poisoned batch; at
    step 30 one layer's gradient is infinite on rank 1."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    wrapped = DistributedDataParallel(model)
    clipper = distclip.GradClipper(
        wrapped,
        INF,
        on_nonfinite="skip",
        watch=distclip.Watch(distclip.per_layer(), every=100),
        rank_norms=distclip.RankNorms(wrapped),
        sinks=[distclip.JSONLSink(path)],
    )
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    draw = torch.Generator().manual_seed(rank)
    for step in range(1, 31):
        x = torch.randn(16, 8, generator=draw)
        bad = (step, rank) == (25, 2)
        optimizer.zero_grad()
        wrapped(1000 * x if bad else x).square().mean().backward()
        if (step, rank) == (30, 1):
            model[1].weight.grad[3] = INF
        file = f"shard-{rank}-{'bad' if bad else step}.bin"
        clipper.step(optimizer, note={"file": file})


def test_the_log_alone_names_step_rank_data_and_layer(ranks, tmp_path):
    path = tmp_path / "log.jsonl"
    ranks.run(explained, str(path))
    _, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    worst = max(rows, key=lambda row: row["deviation"] or 0)
    assert (worst["step"], worst["matters"], worst["outlier_rank"]) == (25, "outlier", 2)
    told = {n["rank"]: n["note"]["file"] for n in worst["notes"] if n["step"] == 25}
    assert told[worst["outlier_rank"]] == "shard-2-bad.bin" and len(told) == 4
    assert worst["layers"] == ["0", "1", "2"] and all(norm > 0 for norm in worst["layer_norms"])
    (skipped,) = [row for row in rows if row["skipped"]]
    (culprit,) = skipped["culprits"]
    assert skipped["step"] == 30 and culprit == {
        "parameter": "1.weight",
        "rank": 1,
        "kind": "inf",
        "before": "0.bias",
        "after": "1.bias",
    }
    assert {n["note"]["file"] for n in skipped["notes"]} >= {f"shard-{r}-30.bin" for r in range(4)}
