"""The training program as it is started: under torchrun, resumed, and with a slip in its configuration."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--training.batch", "8", "--training.steps", "6", "--output.every", "3"]


def start(*arguments, ranks=2):
    launcher = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else [sys.executable]
    )
    command = [*launcher, str(ROOT / "launch" / "train.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True)
    try:
        said, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, said


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("config", ["fsdp2", "ddp_bf16", "ddp_fp16"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, config):
    def run(name, steps):
        return start(
            "--config", str(ROOT / "configs" / f"{config}.yaml"), *SMALL, "--training.steps", str(steps), "--training.warmup", "1000",
            "--clip.threshold", "0.1",
            "--output.log", str(tmp_path / f"{name}.jsonl"), "--output.checkpoint", str(tmp_path / name),
        )  # fmt: skip

    for name, steps in (("whole", 6), ("halves", 3), ("halves", 6)):
        code, said = run(name, steps)
        assert code == 0, said
    assert "distclip plan" in said and "all_reduce" in said
    whole, halves = lines(tmp_path / "whole.jsonl"), lines(tmp_path / "halves.jsonl")
    assert [row["step"] for row in halves] == [1, 2, 3, 4, 5, 6]
    assert [row["total_norm"] for row in halves] == [row["total_norm"] for row in whole]
    assert all(row["clipped"] for row in whole), "vacuous"


def test_all_models_run_in_one_process(tmp_path):
    for model, data in (("recurrent", "temporal_order"), ("lstm", "images"), ("gpt", "text")):
        code, said = start("--model", model, "--data.name", data, "--strategy", "single", *SMALL, ranks=0)
        assert code == 0, said


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--training.lrr", "1"], ["command line: unknown key 'training.lrr'; did you mean 'training.lr'?"]),
        (["--strategy", "fsdp3"], ["strategy: 'fsdp3' needs a launcher"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml: there is no such file"]),
        (
            ["--strategy", "single", "--model", "lstm", "--data.name", "images", "--data.folder", "nowhere"],
            ["train-images-idx3-ubyte(.gz) is not there"],
        ),
        (["--strategy", "single", "--model", "gpt"], ["data.name='temporal_order' does not fit model='gpt'"]),
    ],
)
def test_slips_are_told(arguments, words):
    code, said = start(*arguments, ranks=0)
    assert code != 0
    for word in words:
        assert word in said


def test_an_unknown_key_of_a_file_names_the_nearest(tmp_path):
    (tmp_path / "c.yaml").write_text("training: {warm_up: 3}\n")
    code, said = start("--config", str(tmp_path / "c.yaml"), ranks=0)
    assert code != 0 and "c.yaml: unknown key 'training.warm_up'; did you mean 'training.warmup'?" in said


def test_an_injected_overflow_is_skipped_named_and_survived(tmp_path):
    """As in the README: four ranks, float16, FSDP2."""
    log = tmp_path / "log.jsonl"
    code, said = start(
        "--config", str(ROOT / "configs" / "fsdp2_fp16.yaml"), "--training.steps", "14", "--training.batch", "8",
        "--output.log", str(log), ranks=4,
    )  # fmt: skip
    assert code == 0, said
    assert "distclip: step 11 skipped: 1 gradient is not finite: token.weight on rank 1: inf" in said
    assert "scaler: scale 32768, equal on all ranks" in said
    rows = lines(log)
    assert [row["step"] for row in rows if row["skipped"]] == [11]
    assert rows[10]["culprits"] == [{"parameter": "token.weight", "rank": 1, "kind": "inf"}]
    assert any(row["clipped"] for row in rows), "vacuous"


def test_a_checkpoint_that_was_cut_short_is_told(tmp_path):
    arguments = ["--config", str(ROOT / "configs" / "single.yaml"), *SMALL, "--output.checkpoint", str(tmp_path / "run")]
    assert start(*arguments, ranks=0)[0] == 0
    for part in (tmp_path / "run").glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:1000])
    code, said = start(*arguments, "--training.steps", "9", ranks=0)
    assert code != 0 and "cannot be resumed from" in said and "it was cut short, or is of another model or clipper" in said


def test_a_checkpoint_of_another_clipper_is_told(tmp_path):
    arguments = ["--config", str(ROOT / "configs" / "single.yaml"), *SMALL, "--output.checkpoint", str(tmp_path / "run")]
    assert start(*arguments, ranks=0)[0] == 0
    code, said = start(*arguments, "--clip.threshold", "7.0", ranks=0)
    assert code != 0
    assert "the checkpoint's policy is 'FixedNorm(max_norm=1.0)', this clipper's 'FixedNorm(max_norm=7.0)'" in said
