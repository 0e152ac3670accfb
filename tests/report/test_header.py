"""A log can be read alone: its header, and who may be a sink and where."""

import json
import math
from datetime import datetime, timedelta, timezone

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip.report.header import launcher
from distclip.testing import fully_shard
from parity.layouts import Pair, mesh, trained


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def one(value=5.0):
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.tensor([value])
    return p


def sharded_and_watched(path):
    model = Pair()
    fully_shard(model, mesh=mesh(4))
    trained(model)
    clipper = distclip.GradClipper(
        model,
        policy=distclip.ZClip(),
        norm_type=math.inf,
        watch=distclip.Watch(distclip.per_layer()),
        on_nonfinite="raise",
        sinks=[distclip.JSONLSink(path, run="pilot")],
    )
    clipper.clip_()
    clipper.clip_()
    clipper.rebuild()
    clipper.clip_()
    return [
        [row.parameters, row.elements, row.description, list(row.ranks), row.copies]
        for row in clipper.plan.rows
    ]


def test_a_log_begins_with_what_the_run_is(ranks, tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    rows = ranks.run(sharded_and_watched, str(path))[0]
    header, first, second, again, third = lines_of(path)
    assert [line["step"] for line in (first, second, third)] == [1, 2, 3]
    now = datetime.now(timezone.utc)
    for line in (header, again):
        date, versions = datetime.fromisoformat(line.pop("date")), line.pop("versions")
        assert timedelta(0) <= now - date < timedelta(minutes=10)
        assert (
            versions["distclip"] == distclip.__version__ and versions["torch"] == torch.__version__
        )
        assert versions["python"].startswith("3.")
        assert line.pop("launcher") in ("python", "torchrun")
        plan = line.pop("plan")
        assert [list(row.values()) for row in plan] == rows and plan[0]["ranks"] == [0, 1, 2, 3]
        assert line == {
            "distclip_log": 2,
            "run": "pilot",
            "policy": line["policy"],
            "groups": ["all"],
            "norm_type": None,  # inf, as everywhere in the log
            "world_size": 4,
            "on_nonfinite": "raise",
            "layers": ["first", "second"],
            "device": "cpu",
        }
        assert line["policy"].startswith("ZClip(")


def test_another_process_writes_a_header_of_its_own(tmp_path):
    path = tmp_path / "run.jsonl"
    for max_norm in (1.0, 2.0):  # a clipper and a sink of its own, as after a restart
        clipper = distclip.GradClipper([("w", one())], max_norm, sinks=[distclip.JSONLSink(path)])
        clipper.clip_()
    kinds = ["policy" if "distclip_log" in line else "step" for line in lines_of(path)]
    assert kinds == ["policy", "step"] * 2
    policies = [line["policy"] for line in lines_of(path) if "policy" in line]
    assert policies == ["FixedNorm(max_norm=1.0)", "FixedNorm(max_norm=2.0)"]


@pytest.mark.parametrize(
    "marks, name",
    [
        ({}, "python"),
        ({"SLURM_PROCID": "0"}, "slurm"),
        ({"SLURM_PROCID": "0", "TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        ({"CROSS_RANK": "0"}, "deepspeed"),
        ({"TORCHELASTIC_RUN_ID": "a", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"}, "accelerate"),
        # transformers' TrainingArguments sets this one too
        ({"TORCHELASTIC_RUN_ID": "a", "ACCELERATE_MIXED_PRECISION": "no"}, "torchrun"),
    ],
)
def test_the_launcher_is_known_by_what_it_alone_sets(marks, name, monkeypatch):
    monkeypatch.setattr("os.environ", marks)
    assert launcher() == name


class Begun:
    def __init__(self):
        self.said = []

    def begin(self, header):
        self.said.append(header["policy"])

    def write(self, report):
        self.said.append(report.step)


def test_a_function_is_a_sink_and_an_object_may_ask_for_the_header():
    norms, begun = [], Begun()
    sinks = [lambda report: norms.append(report.total_norm.item()), begun]
    p = one()
    clipper = distclip.GradClipper([("w", p)], 1.0, sinks=sinks)
    assert begun.said == [], "nothing before the first step"
    clipper.clip_()
    p.grad = torch.tensor([0.5])
    clipper.clip_()
    assert norms == [5.0, 0.5] and begun.said == ["FixedNorm(max_norm=1.0)", 1, 2]


def test_a_function_that_fails_is_named_and_off():
    def publish(report):
        raise OSError("no way out")

    clipper = distclip.GradClipper([("w", one())], 1.0, sinks=[publish])
    with pytest.warns(RuntimeWarning, match="publish failed at step 1 and is off from now on"):
        clipper.clip_()
    clipper.clip_()


def test_sinks_without_a_place_to_write_to_write_nothing(tmp_path):
    report = distclip.GradClipper([("w", one())], 1.0).clip_()
    for sink in (
        distclip.WandbSink(None),
        distclip.JSONLSink(None),
        distclip.TensorBoardSink(None),
    ):
        sink.write(report)
    distclip.JSONLSink(None).begin({"distclip_log": 2})
    assert list(tmp_path.iterdir()) == []


def alone_on_each_rank(folder):
    """Clippers of single ranks, as of pipeline stages: a run is made on the first rank alone."""
    rows, first = [], dist.get_rank() == 0
    sinks = [
        distclip.WandbSink(Run(rows) if first else None),
        distclip.JSONLSink(f"{folder}/log.jsonl" if first else None),
        rows.append if first else None,
    ]
    options = {"process_group": distclip.LOCAL}
    clipper = distclip.GradClipper([("w", one())], 1.0, sinks=sinks, **options)
    clipper.clip_()
    distclip.GradClipper([("w", one())], 1.0, sinks=[] if first else None, **options).clip_()
    return len(rows)


class Run:
    def __init__(self, rows):
        self.rows = rows

    def log(self, data, step):
        self.rows.append(data)


def test_none_is_right_where_nothing_is_written(ranks, tmp_path):
    assert ranks.run(alone_on_each_rank, str(tmp_path)) == [2, 0, 0, 0]
    assert [line["step"] for line in lines_of(tmp_path / "log.jsonl")[1:]] == [1]
