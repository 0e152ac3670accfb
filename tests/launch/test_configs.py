"""Every file of configs/ is started as it is, for a few steps. A file that nothing starts is an
error."""

import json
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from launch.programs import ROOT, launched, lines, train_here, train_with

CONFIGS = ROOT / "configs"
FILES = sorted(path.relative_to(CONFIGS) for path in CONFIGS.rglob("*") if path.is_file())
FEW = ("--training.steps", "3", "--training.batch", "16")
TORCH = ("ddp", "fsdp1", "fsdp2", "hsdp", "tp", "pp", "tp_fsdp2")


def read(path):
    return yaml.safe_load((CONFIGS / path).read_text())


ENGINES = [path for path in FILES if len(path.parts) == 1 and read(path)["strategy"] == "deepspeed"]
RESUMED = ("zero2", "zero3")


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """All DeepSpeed configurations one after the other on two ranks: with a bad step each; of some,
    interrupted runs. Logs by name."""
    folder = tmp_path_factory.mktemp("engines")
    jobs = []
    for path in ENGINES:
        whole = [
            *FEW,
            "--config",
            str(CONFIGS / path),
            "--output.log",
            str(folder / f"{path.stem}.jsonl"),
            "--clip.threshold",
            "0.5",
        ]
        bad = [
            "--inject.kind",
            "nan",
            "--inject.step",
            "1",
            "--inject.rank",
            "1",
            "--training.warmup",
            "1000",
        ]
        jobs.append([*whole, *bad])
        if path.stem.removeprefix("deepspeed_") in RESUMED:
            log = [
                "--output.log",
                str(folder / f"{path.stem}_halves.jsonl"),
                "--output.checkpoint",
                str(folder / path.stem),
            ]
            jobs += [[*whole, *bad, *log, "--training.steps", "2"], [*whole, *bad, *log]]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    code, said = launched(
        [*launcher, ROOT / "tests/launch/each.py", json.dumps(jobs)],
        PYTHONPATH=f"{ROOT / 'src'}:{ROOT / 'tests'}",
    )
    assert code == 0, said[-6000:]
    assert said.count("equal on all ranks") == len(jobs) and "NOT EQUAL" not in said
    return {log.stem: lines(log) for log in folder.glob("*.jsonl")}


@pytest.fixture(scope="module")
def rows_by_accelerate(tmp_path_factory):
    """What a configuration of Accelerate's logs; each is started once."""
    folder = tmp_path_factory.mktemp("accelerate")

    @cache
    def rows_of(path):
        log = folder / f"{path.stem}.jsonl"
        return by_accelerate(path, "--output.log", str(log), "--output.checkpoint", "")

    return rows_of


@pytest.mark.parametrize("path", FILES, ids=str)
def test_it_trains(path, ranks, tmp_path, request):
    log = tmp_path / "log.jsonl"
    rolls_back = len(path.parts) == 1 and "escalate" in read(path)["clip"]
    folder = str(tmp_path / "checkpoint") if rolls_back else ""
    to = ("--output.log", str(log), "--output.checkpoint", folder)
    if path.parts[0] == "deepspeed":  # DeepSpeed's own: the configurations that name it are started
        users = [
            other for other in ENGINES if Path(read(other)["deepspeed"]) == Path("configs") / path
        ]
        rows = [row for user in users for row in request.getfixturevalue("engines")[user.stem]]
        assert rows
        return
    if path.parts[0] == "accelerate":
        rows = request.getfixturevalue("rows_by_accelerate")(path)
    elif read(path)["strategy"] == "accelerate":
        assert any(other.parts[0] == "accelerate" for other in FILES), (
            "it is started with each of those"
        )
        return
    elif read(path)["strategy"] == "deepspeed":
        rows = request.getfixturevalue("engines")[path.stem]
        assert [row["skipped"] for row in rows] == [False, True, False]
        assert all(row["clipped"] for row in rows if not row["skipped"])
    else:
        assert read(path)["strategy"] in ("single", *TORCH), "a strategy that no test starts"
        fp16 = read(path)["training"].get("precision") == "fp16"
        bad = (
            ("--inject.kind", "overflow", "--inject.step", "1", "--inject.rank", "0")
            if fp16
            else ()
        )
        arguments = (*FEW, "--config", str(CONFIGS / path), *to, *bad)
        said = (
            train_here(*arguments)
            if read(path)["strategy"] == "single"
            else train_with(ranks, *arguments)
        )
        rows = lines(log)
        assert [row["skipped"] for row in rows] == [False, fp16, False]
        assert "NOT EQUAL" not in said and said.count("equal on all ranks") == 1 + fp16
        assert not fp16 or "scaler: scale 32768" in said
    assert len(rows) == 3 and all((row["total_norm"] or 1) > 0 for row in rows)


def by_accelerate(path, *arguments):
    """One step of three is spoilt on one rank."""
    code, said = launched(
        ["launch/accelerate.sh", CONFIGS / path, "--config", CONFIGS / "accelerate.yaml", *FEW, "--training.warmup", "1000", *arguments,
         "--inject.kind", "nan", "--inject.step", "1", "--inject.rank", "1"]
    )  # fmt: skip
    assert code == 0, said[-6000:]
    assert "steps: " in said and ", equal on all ranks" in said
    rows = lines(Path(arguments[1]))
    assert [row["skipped"] for row in rows] == [False, True, False][: len(rows)]
    return rows


def test_a_run_by_accelerate_is_resumed(rows_by_accelerate, tmp_path):
    path = Path("accelerate/fsdp2.yaml")
    whole = rows_by_accelerate(path)
    halves = (
        "--output.log",
        str(tmp_path / "halves.jsonl"),
        "--output.checkpoint",
        str(tmp_path / "halves"),
    )
    by_accelerate(path, *halves, "--training.steps", "2")
    rows = by_accelerate(path, *halves)
    assert [row["total_norm"] for row in rows] == [row["total_norm"] for row in whole]


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_by_deepspeed_is_resumed(engines, name):
    whole, halves = engines[f"deepspeed_{name}"], engines[f"deepspeed_{name}_halves"]
    assert [row["step"] for row in halves] == [1, 2, 3]
    assert [row["total_norm"] for row in halves] == [row["total_norm"] for row in whole]


def test_all_ways_to_shard_by_deepspeed_have_the_same_norms(engines):
    fp32 = [p.stem for p in ENGINES if read(p)["training"].get("precision", "fp32") == "fp32"]
    assert len(fp32) > 3
    first = [row["total_norm"] for row in engines[fp32[0]] if not row["skipped"]]
    for name in fp32:
        assert [row["total_norm"] for row in engines[name] if not row["skipped"]] == pytest.approx(
            first, rel=1e-4
        )
