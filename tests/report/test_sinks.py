"""What each sink writes, and that one that fails is told once. TensorBoard's files are read back by
its own reader."""

import gc
import json
import math
import sys
import warnings
import weakref

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard.writer import SummaryWriter

import distclip
from late import judged_late


def clipper_of(*sinks, **options):
    """A clipper with these sinks, as a function that clips gradients of the given norms."""
    return clipper_with(sinks, **options)


def clipper_with(sinks, policy=None, parameters=1, **options):
    params = [(f"p{i}", nn.Parameter(torch.zeros(2))) for i in range(parameters)]
    clipper = distclip.GradClipper(
        params, **({"policy": policy} if policy else {"max_norm": 1.0}), **options, sinks=sinks
    )

    def clip(*norms):
        for norm in norms:
            for _, p in params:
                p.grad = torch.tensor([0.6, 0.8]) * norm
            clipper.clip_()

    return clip


class Recorder:
    """A run as W&B has it: `log(dict, step=)`, an error once it is finished."""

    def __init__(self):
        self.rows, self.finished = [], False

    def log(self, data, step):
        if self.finished:
            raise RuntimeError("Run (abc) is finished. The call to `log` will be ignored.")
        self.rows.append((step, data))


def rows_of(path):
    """Those of a log's steps."""
    rows = map(json.loads, path.read_text().splitlines())
    return [row for row in rows if "distclip_log" not in row]


def test_group_vectors_are_written_at_an_interval_and_at_skipped_steps(tmp_path):
    every, lean = tmp_path / "every.jsonl", tmp_path / "lean.jsonl"
    clip = clipper_of(
        distclip.JSONLSink(every),
        distclip.JSONLSink(lean, groups_every=3),
        groups=distclip.per_parameter(),
        parameters=2,
    )
    clip(3.0, 0.5, 2.0, math.nan, 0.25, 0.75)
    full, short = rows_of(every), rows_of(lean)
    vectors = {"groups", "group_norms", "coefs", "threshold"}
    assert all(vectors <= row.keys() for row in full)
    assert [row["step"] for row in short if vectors <= row.keys()] == [3, 4, 6], (
        "each third step and the skipped one"
    )
    for a, b in zip(full, short, strict=True):
        assert {k: a[k] for k in b} == b
        assert b.keys() >= {
            "step",
            "total_norm",
            "norm_after",
            "clipped",
            "skipped",
            "nonfinite",
            "culprits",
        }
        assert b.keys() == a.keys() or not vectors & b.keys(), "all of them or none"


def test_one_group_is_always_written(tmp_path):
    clip = clipper_of(distclip.JSONLSink(tmp_path / "log", groups_every=5))
    clip(3.0, 0.5)
    assert [(row["threshold"], row["clip_coef"]) for row in rows_of(tmp_path / "log")] == [
        ([1.0], pytest.approx(1 / 3)),
        ([1.0], 1.0),
    ]


def test_a_spike_is_not_told_as_a_bad_gradient(caplog):
    clip = clipper_of(
        distclip.LoggingSink(),
        policy=distclip.SkipSpikes(distclip.FixedNorm(1.0), window=8, warmup=4),
    )
    caplog.set_level("INFO", logger="distclip")
    clip(4.0, 4.5, 4.25, 4.0, 123.0, 4.0, math.inf)
    assert caplog.messages[4:] == [
        "step 5 skipped: left out by the policy: norm 123, the 4 steps taken before had at most 4.5",
        "step 6: norm 4, coefficient 0.25",
        "step 7 skipped: 1 gradient is not finite: p0 on rank 0: inf",
    ]
    assert [record.levelname for record in caplog.records[4:]] == ["WARNING", "INFO", "WARNING"]


def test_the_log_at_an_interval(caplog):
    clip = clipper_of(distclip.LoggingSink(every=2), groups=distclip.per_parameter(), parameters=5)
    caplog.set_level("INFO", logger="distclip")
    clip(2.0, 2.0, math.nan)
    assert caplog.messages[0] == "step 2: norm 4.47214, coefficient 0.5, 0.5, 0.5, 0.5, …"
    assert caplog.messages[1].startswith(
        "step 3 skipped: 5 gradients are not finite: p0 on rank 0: NaN; p1 on rank 0: NaN"
    )


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def test_tensorboard_holds_each_number_at_its_step(tmp_path):
    clip = clipper_of(distclip.TensorBoardSink(tmp_path), policy=distclip.FixedNorm(2.5))
    clip(5.0, 0.5, math.nan)
    del clip  # the writer is closed with the sink
    found = events(tmp_path)

    def read(tag):
        return [(event.step, event.value) for event in found.Scalars(tag)]

    norms = read("clip/total_norm")
    assert norms[:2] == [(1, 5.0), (2, 0.5)] and math.isnan(norms[2][1])
    assert read("clip/clip_coef") == [(1, 0.5), (2, 1.0), (3, 0.0)]
    assert read("clip/skipped") == [(1, 0.0), (2, 0.0), (3, 1.0)] and read("clip/nonfinite")[2] == (
        3,
        1.0,
    )
    assert read("clip/threshold") == [(1, 2.5), (2, 2.5), (3, 2.5)]
    text = found.Tensors("clip/culprits/text_summary")
    assert [event.step for event in text] == [3] and text[0].tensor_proto.string_val == [
        b"p0 on rank 0: NaN"
    ]


def test_tensorboard_takes_a_writer_that_the_user_closes(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        clip = clipper_of(distclip.TensorBoardSink(writer, every=2))
        clip(2.0, 3.0, 4.0, math.inf)
        writer.add_scalar("mine", 1.0, 5)
    assert [event.step for event in events(tmp_path).Scalars("clip/total_norm")] == [2, 4]
    assert events(tmp_path).Scalars("mine")[0].step == 5


@pytest.mark.parametrize("groups", [3, 51])
def test_trackers_with_several_groups(groups):
    run = Recorder()
    clip = clipper_of(distclip.WandbSink(run), groups=distclip.per_parameter(), parameters=groups)
    clip(4.0)
    step, row = run.rows[0]
    assert step == 1 and row["clip/total_norm"] == pytest.approx(4 * math.sqrt(groups))
    if groups == 3:
        assert [row[f"clip/group_norm/p{i}"] for i in range(3)] == [4.0] * 3 and row[
            "clip/coef/p1"
        ] == 0.25
        assert row["clip/threshold/p2"] == 1.0
    else:
        assert row["clip/largest_group_norm"] == 4.0 and row["clip/smallest_coef"] == 0.25
        assert not [name for name in row if "/p" in name]


def test_measuring_alone_has_no_threshold():
    run = Recorder()
    clipper_of(distclip.WandbSink(run), policy=distclip.FixedNorm(math.inf))(2.0)
    assert "clip/threshold" not in run.rows[0][1] and run.rows[0][1]["clip/clip_coef"] == 1


def closed_run():
    run = Recorder()
    return run, distclip.WandbSink(run), lambda: setattr(run, "finished", True)


FAILS = {
    "closed run": (
        closed_run,
        "WandbSink failed at step 2 and is off from now on, training goes "
        "on: RuntimeError: Run (abc) is finished.",
    ),
    "closed writer": (
        None,
        "TensorBoardSink failed at step 2 and is off from now on, training "
        "goes on: OSError: Writer is closed",
    ),
}


@pytest.mark.parametrize("name", FAILS)
def test_a_closed_run_is_told_once_and_training_goes_on(name, tmp_path):
    make, text = FAILS[name]
    if make is None:
        writer = SummaryWriter(str(tmp_path / "tensorboard"))
        sink, close = distclip.TensorBoardSink(writer), writer.file_writer.close
    else:
        _, sink, close = make()
    clip = clipper_of(sink, distclip.JSONLSink(tmp_path / "log"))
    clip(2.0)
    close()
    with pytest.warns(RuntimeWarning) as warned:
        clip(3.0)
    assert len(warned) == 1 and str(warned[0].message).startswith(text)
    clip(4.0)
    assert [row["total_norm"] for row in rows_of(tmp_path / "log")] == [2.0, 3.0, 4.0]


REFUSED = {
    "no tensorboard": (
        lambda: distclip.TensorBoardSink("runs"),
        'TensorBoardSink needs the package tensorboard: pip install "distclip[tensorboard]"',
    ),
    "no run": (
        lambda: distclip.WandbSink("runs"),
        "WandbSink: 'runs' has no log(dict, step=); pass what wandb.init() gave",
    ),
    "every 0": (
        lambda: distclip.LoggingSink(every=0),
        "LoggingSink: every=0 must be a whole number of steps, at least 1; 1 writes at every step",
    ),
    "every ½": (
        lambda: distclip.JSONLSink("log", groups_every=0.5),
        "JSONLSink: groups_every=0.5 must be a whole number of steps, at least 1; 1 writes at "
        "every step",
    ),
}


@pytest.mark.parametrize("make, text", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_honoured_is_refused_when_the_sink_is_made(make, text, monkeypatch):
    for module in [m for m in sys.modules if m.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    with pytest.raises(distclip.ConfigError) as error:
        make()
    assert str(error.value) == text


def on_a_rank(folder):
    import torch.distributed as dist

    rank = dist.get_rank()
    clip = clipper_of(
        distclip.TensorBoardSink(f"{folder}/{rank}"), distclip.JSONLSink(f"{folder}/{rank}.jsonl")
    )
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        clip(2.0, 3.0)
    return len(warned)


def test_only_the_first_rank_writes(ranks, tmp_path):
    assert ranks.run(on_a_rank, str(tmp_path)) == [0] * 4
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["0.jsonl"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["0"], (
        "no empty files of ranks that never write"
    )
    assert [event.value for event in events(tmp_path / "0").Scalars("clip/total_norm")] == [
        2.0,
        3.0,
    ]


def made_on_one_rank(writer, folder, kind):
    """As users write it: what writes is made on one rank, the sink on all."""
    import torch.distributed as dist

    mine = dist.get_rank() == writer
    run = Recorder()
    sinks = {
        "wandb": lambda: [distclip.WandbSink(run if mine else None)],
        "tensorboard": lambda: [distclip.TensorBoardSink(f"{folder}/board" if mine else None)],
        "jsonl": lambda: [distclip.JSONLSink(f"{folder}/log.jsonl" if mine else None)],
        "none": lambda: [distclip.WandbSink(run) if mine else None],
        "no list": lambda: [distclip.WandbSink(run)] if mine else None,
    }[kind]()
    try:
        clip = clipper_with(sinks)
    except distclip.DistclipError as error:
        return f"{type(error).__name__}: {error}"
    clip(2.0, 3.0)
    return [row["clip/total_norm"] for _, row in run.rows]


@pytest.mark.parametrize("kind", ["wandb", "tensorboard", "jsonl", "none", "no list"])
def test_what_is_made_on_the_writing_rank_alone_is_enough(ranks, tmp_path, kind):
    said = ranks.run(made_on_one_rank, 0, str(tmp_path), kind)
    assert all(isinstance(one, list) for one in said), said
    if kind in ("wandb", "none", "no list"):
        assert said == [[2.0, 3.0], [], [], []]
    elif kind == "jsonl":
        assert [row["total_norm"] for row in rows_of(tmp_path / "log.jsonl")] == [2.0, 3.0]
    else:
        assert [event.value for event in events(tmp_path / "board").Scalars("clip/total_norm")] == [
            2.0,
            3.0,
        ]


WRITES = (
    "on rank 0, the first of the process group, which writes. What is made on one rank alone (a "
    "run, a writer) must be made on this one; "
    "others may pass None"
)
LACKING = {
    "wandb": f"sinks[0], WandbSink: its run is None {WRITES}",
    "tensorboard": f"sinks[0], TensorBoardSink: its writer is None {WRITES}",
    "jsonl": f"sinks[0], JSONLSink: its path is None {WRITES}",
    "none": f"sinks[0], None: it is None {WRITES}",
    "no list": "sinks=None on rank 0, which writes; pass a list, such as "
    "sinks=[distclip.JSONLSink('run.jsonl')]",
}


@pytest.mark.parametrize("kind, text", LACKING.items(), ids=LACKING)
def test_what_the_writing_rank_lacks_is_refused_on_all_ranks(ranks, tmp_path, kind, text):
    said = ranks.run(made_on_one_rank, 3, str(tmp_path), kind)
    assert said[0] == f"ConfigError: {text}"
    assert (
        said[1:]
        == [
            f"AgreementError: another rank could not build its GradClipper:\nrank 0: "
            f"ConfigError: {text}"
        ]
        * 3
    )
    assert list(tmp_path.iterdir()) == []


NO_SINKS = {
    "a generator": (
        lambda: (sink for sink in [distclip.LoggingSink()]),
        "which writes; pass a list",
    ),
    "one sink": (distclip.LoggingSink, "which writes; pass a list"),
    "a path": (lambda: "run.jsonl", "sinks='run.jsonl' on rank 0, which writes; pass a list"),
    "a class": (
        lambda: [distclip.LoggingSink],
        "sinks[0], <class 'distclip.report.sinks.LoggingSink'>: it has no write(report)",
    ),
    "an object": (
        lambda: [distclip.LoggingSink(), object()],
        "sinks[1], object: it has no write(report)",
    ),
}


@pytest.mark.parametrize("make, text", NO_SINKS.values(), ids=NO_SINKS)
def test_what_is_no_sink_is_refused_at_set_up(make, text):
    with pytest.raises(distclip.ConfigError) as error:
        distclip.GradClipper([("p", nn.Parameter(torch.zeros(2)))], max_norm=1.0, sinks=make())
    assert text in str(error.value)


def test_rebuilding_keeps_one_writer():
    """With it one header, which has the name of each layer."""
    p = nn.Parameter(torch.zeros(1))
    clipper, writers = distclip.GradClipper([("w", p)], 1.0, sinks=[print]), []
    for _ in range(3):
        writers.append(weakref.ref(clipper._writer))
        clipper.rebuild()
    gc.collect()
    assert [writer() for writer in writers] == [None] * 3 and len(clipper._writer.sinks) == 1


def test_a_step_that_is_taken_back_leaves_nothing_to_the_next_of_its_number():
    """The last step of a run is written before it is judged; the one before had its number."""
    seen = []
    p = nn.Parameter(torch.zeros(1))
    clipper = judged_late(distclip.GradClipper([("w", p)], 1.0, sinks=[seen.append]))
    optimizer = torch.optim.SGD([p], 1.0, fused=True)

    def step(value):
        p.grad = torch.tensor([value])
        clipper.step(optimizer)

    step(1.0)
    saved = clipper.state_dict()
    step(math.nan)
    clipper.load_state_dict(saved)
    step(1.0)
    clipper._writer.flush()
    assert [(r.step, r.matters, len(r.culprits)) for r in seen] == [
        (1, None, 0),
        (2, "skipped", 1),
        (2, None, 0),
    ]
