"""The training program as it is started: under torchrun, resumed, and with a slip in its configuration."""

import sys

import pytest

from launch.programs import ROOT, launched, lines, main_here, norms, start, train_here, train_with


def refused(*arguments):
    """What the program says instead of training."""
    with pytest.raises((SystemExit, FileNotFoundError)) as told:
        main_here(*arguments)
    return str(told.value)


SMALL = ["--training.batch", "8", "--training.steps", "6", "--output.every", "3"]


@pytest.mark.parametrize("config", ["ddp_bf16", "ddp_fp16", "fsdp1_fp16", "autoclip"])
def test_a_resumed_run_equals_an_uninterrupted_one(ranks, tmp_path, config):
    """The scaler's state and the policy's among the rest."""

    def run(name, steps):
        return train_with(
            ranks,
            "--config", str(ROOT / "configs" / f"{config}.yaml"), *SMALL, "--training.steps", str(steps), "--training.warmup", "1000",
            "--clip.threshold", "0.1",
            "--output.log", str(tmp_path / f"{name}.jsonl"), "--output.checkpoint", str(tmp_path / name),
        )  # fmt: skip

    for name, steps in (("whole", 6), ("halves", 3), ("halves", 6)):
        said = run(name, steps)
        assert "distclip plan" in said and "all_reduce" in said and "NOT EQUAL" not in said
    whole, halves = lines(tmp_path / "whole.jsonl"), lines(tmp_path / "halves.jsonl")
    assert [row["step"] for row in halves] == [1, 2, 3, 4, 5, 6]
    assert norms(tmp_path / "halves.jsonl") == norms(tmp_path / "whole.jsonl")
    assert all(row["clipped"] for row in whole), "vacuous"


def test_all_models_run_in_one_process(tmp_path):
    for model, data in (("recurrent", "temporal_order"), ("lstm", "images"), ("gpt", "text")):
        log = tmp_path / f"{model}.jsonl"
        train_here("--model", model, "--data.name", data, "--strategy", "single", *SMALL, "--output.log", str(log))
        assert len(lines(log)) == 6


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--training.lrr", "1"], ["command line: unknown key 'training.lrr'; did you mean 'training.lr'?"]),
        (["--strategy", "fsdp3"], ["strategy: 'fsdp3' is not known; it is one of single, ddp, fsdp1, fsdp2, hsdp, tp,"]),
        (["--strategy", "pp", "--model", "gpt"], ["strategy: 'pp' needs a launcher: launch/torchrun.sh ..., see the head of that file"]),
        (["--strategy", "accelerate", "--model", "gpt"], ["needs a launcher: launch/accelerate.sh ..."]),
        (
            ["--strategy", "tp", "--model", "lstm"],
            ["'tp' splits a GPT's blocks, and model='lstm' has none; use model: gpt, or strategy ddp"],
        ),
        (["--deepspeed", "x.json"], ["deepspeed='x.json' has no part in strategy='ddp'; leave it out, or use strategy: deepspeed"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml: there is no such file"]),
        (
            ["--strategy", "single", "--model", "lstm", "--data.name", "images", "--data.folder", "nowhere"],
            ["train-images-idx3-ubyte(.gz) is not there"],
        ),
        (["--strategy", "single", "--model", "gpt"], ["data.name='temporal_order' does not fit model='gpt'"]),
    ],
)
def test_slips_are_told(arguments, words):
    told = refused(*arguments)
    for word in words:
        assert word in told


def test_an_unknown_key_of_a_file_names_the_nearest(tmp_path):
    (tmp_path / "c.yaml").write_text("training: {warm_up: 3}\n")
    assert "c.yaml: unknown key 'training.warm_up'; did you mean 'training.warmup'?" in refused("--config", str(tmp_path / "c.yaml"))


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


@pytest.fixture
def saved(tmp_path):
    """A checkpoint, and the arguments that made it."""
    arguments = ["--config", str(ROOT / "configs" / "single.yaml"), *SMALL, "--output.checkpoint", str(tmp_path / "run")]
    train_here(*arguments)
    return arguments, tmp_path / "run"


def test_only_the_newest_checkpoint_is_kept_and_one_that_was_not_finished_is_passed_over(saved):
    arguments, folder = saved
    assert [path.name for path in folder.iterdir()] == ["step6"]
    (folder / "step9").mkdir()  # killed before its metadata were written
    train_here(*arguments, "--training.steps", "7")
    assert [path.name for path in folder.iterdir()] == ["step7"]


def test_a_checkpoint_that_was_cut_short_is_told(saved):
    arguments, folder = saved
    for part in folder.rglob("*.distcp"):
        part.write_bytes(part.read_bytes()[:1000])
    told = refused(*arguments, "--training.steps", "9")
    assert "cannot be resumed from" in told and "it was cut short, or is of another model or clipper" in told


def test_a_checkpoint_of_another_clipper_is_told(saved):
    told = refused(*saved[0], "--clip.mode", "normalize")
    assert "the checkpoint's policy is 'FixedNorm(max_norm=1.0)', this clipper's 'Normalize(norm=1.0)'" in told


def test_a_threshold_may_change_at_resume(saved):
    with pytest.warns(RuntimeWarning, match=r"FixedNorm\(max_norm=1.0\) became FixedNorm\(max_norm=7.0\) \(all\)"):
        train_here(*saved[0], "--clip.threshold", "7.0", "--training.steps", "7")
    assert [path.name for path in saved[1].iterdir()] == ["step7"]


def test_what_deepspeeds_json_says_otherwise_is_told():
    """In one process, since each import of DeepSpeed takes seconds."""
    cases = (
        ([], "is no file; strategy: deepspeed needs DeepSpeed's JSON, and configs/deepspeed/ holds some"),
        (["--deepspeed", "configs/deepspeed/zero2.json", "--training.batch", "32"],
         "configs/deepspeed/zero2.json: train_micro_batch_size_per_gpu is 8, but training.batch=32 on 2 ranks in training.accumulate=1 "
         "micro-steps makes it 16; change one of them"),
        (["--deepspeed", "configs/deepspeed/zero1.json", "--training.batch", "16"],
         "configs/deepspeed/zero1.json is for bf16, and training.precision is fp32; change one of them"),
        (["--deepspeed", "configs/deepspeed/zero2.json", "--training.batch", "32", "--training.accumulate", "2"],
         "configs/deepspeed/zero2.json: gradient_accumulation_steps is 1, but training.batch=32 on 2 ranks in training.accumulate=2"),
    )  # fmt: skip
    program = f"""
import sys
sys.path.insert(0, "launch")
from config import read
from jobs.engine import engine_table
for arguments in {[arguments for arguments, _ in cases]!r}:
    try:
        engine_table(read(["--strategy", "deepspeed", *arguments]), 2)
    except SystemExit as told:
        print(told)
"""
    code, said = launched([sys.executable, "-c", program])
    assert code == 0, said
    for _, words in cases:
        assert words in said
