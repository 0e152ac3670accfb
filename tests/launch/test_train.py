"""The training program as it is started: under torchrun, resumed, and with a slip in its
configuration."""

import json
import sys

import pytest
from torch.distributed.fsdp import FSDPModule

from launch.programs import (
    ROOT,
    launched,
    lines,
    main_code,
    main_here,
    norms,
    start,
    train_here,
    train_with,
)
from launch.test_data import programs  # noqa: F401 - a fixture: the programs' modules are found


def refused(*arguments):
    """What the program says instead of training."""
    with pytest.raises(SystemExit) as told:
        main_here(*arguments)
    assert type(told.value).__name__ == "Refused"
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
        train_here(
            "--model",
            model,
            "--data.name",
            data,
            "--strategy",
            "single",
            *SMALL,
            "--output.log",
            str(log),
        )
        assert len(lines(log)) == 6


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["--training.lrr", "1"],
            ["command line: unknown key 'training.lrr'; did you mean 'training.lr'?"],
        ),
        (
            ["--strategy", "fsdp3"],
            ["strategy: 'fsdp3' is not known; it is one of single, ddp, fsdp1, fsdp2, hsdp, tp,"],
        ),
        (
            ["--strategy", "pp", "--model", "gpt"],
            ["strategy: 'pp' needs a launcher: launch/torchrun.sh ..., see the head of that file"],
        ),
        (
            ["--strategy", "accelerate", "--model", "gpt"],
            ["needs a launcher: launch/accelerate.sh ..."],
        ),
        (
            ["--strategy", "tp", "--model", "lstm"],
            [
                "'tp' splits a GPT's blocks, and model='lstm' has none; use model: gpt, or "
                "strategy "
                "ddp"
            ],
        ),
        (
            ["--deepspeed", "x.json"],
            [
                "deepspeed='x.json' has no part in strategy='ddp'; leave it out (over a file: "
                '--deepspeed ""), or use strategy: deepspeed'
            ],
        ),
        (["--config", "nowhere.yaml"], ["nowhere.yaml: there is no such file"]),
        (
            [
                "--strategy",
                "single",
                "--model",
                "lstm",
                "--data.name",
                "images",
                "--data.folder",
                "nowhere",
            ],
            ["train-images-idx3-ubyte(.gz) is not there"],
        ),
        (
            ["--strategy", "single", "--model", "gpt"],
            ["data.name='temporal_order' does not fit model='gpt'"],
        ),
    ],
)
def test_slips_are_told(arguments, words):
    told = refused(*arguments)
    for word in words:
        assert word in told


def test_an_unknown_key_of_a_file_names_the_nearest(tmp_path):
    (tmp_path / "c.yaml").write_text("training: {warm_up: 3}\n")
    assert "c.yaml: unknown key 'training.warm_up'; did you mean 'training.warmup'?" in refused(
        "--config", str(tmp_path / "c.yaml")
    )


def test_an_injected_overflow_is_skipped_named_and_survived(tmp_path):
    """As in the README: four ranks, float16, FSDP2."""
    log = tmp_path / "log.jsonl"
    code, said = start(
        "--config", str(ROOT / "configs" / "fsdp2_fp16.yaml"), "--training.steps", "14", "--training.batch", "8",
        "--output.log", str(log), ranks=4,
    )  # fmt: skip
    assert code == 0, said
    assert (
        "distclip: step 11 skipped: 1 gradient is not finite: token.weight on rank 1: inf" in said
    )
    assert "scaler: scale 32768, equal on all ranks" in said
    rows = lines(log)
    assert [row["step"] for row in rows if row["skipped"]] == [11]
    (culprit,) = rows[10]["culprits"]
    assert (culprit["parameter"], culprit["rank"], culprit["kind"]) == ("token.weight", 1, "inf")
    assert culprit["before"] is None and culprit["after"] == "position.weight", "its neighbours"
    assert any(row["clipped"] for row in rows), "vacuous"
    notes = [note for note in rows[10]["notes"] if note["step"] == 11]
    assert [(note["rank"], note["note"]) for note in notes] == [
        (rank, {"batch": 10, "samples": [2 * rank, 2 * rank + 1]}) for rank in range(4)
    ]


@pytest.fixture
def saved(tmp_path):
    """A checkpoint, and the arguments that made it."""
    arguments = [
        "--config",
        str(ROOT / "configs" / "single.yaml"),
        *SMALL,
        "--output.checkpoint",
        str(tmp_path / "run"),
    ]
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
    assert (
        "cannot be resumed from" in told
        and "it was cut short, or is of another model or clipper" in told
    )


def test_a_checkpoint_of_another_clipper_is_told(saved):
    told = refused(*saved[0], "--clip.mode", "normalize")
    assert (
        "cannot be resumed from (" in told
        and "FixedNorm(max_norm=1.0)" in told
        and "Normalize(norm=1.0)" in told
    )


def test_a_threshold_may_change_at_resume(saved):
    with pytest.warns(
        RuntimeWarning,
        match=r"FixedNorm\(max_norm=1.0\) became "
        r"FixedNorm\(max_norm=7.0\) \(all\)",
    ):
        train_here(*saved[0], "--clip.threshold", "7.0", "--training.steps", "7")
    assert [path.name for path in saved[1].iterdir()] == ["step7"]


def test_a_run_says_where_it_stands_and_where_its_log_is(saved, tmp_path):
    arguments, folder = saved
    log = tmp_path / "log.jsonl"
    arguments = [*arguments, "--output.log", str(log)]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    said = train_here(*arguments)
    assert said.splitlines()[-1] == (
        f"nothing to train: {folder} holds a checkpoint of step 6, and training.steps=6 is "
        f"reached; raise --training.steps to go on, "
        "or name another --output.checkpoint to start anew"
    )
    assert "bits of the coefficients" not in said and not log.exists()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    said = train_here(*arguments, "--training.steps", "4")
    assert "holds a checkpoint of step 6, and training.steps=4 is reached" in said
    said = train_here(*arguments, "--training.steps", "8").splitlines()
    assert f"resumed: {folder} holds a checkpoint of step 6; 2 of 8 steps are left" in said
    assert (
        said[-2:] == [f"checkpoint: {folder}", f"log: {log}; distclip report {log}"]
        and len(lines(log)) == 2
    )
    said = train_here(*arguments, "--output.checkpoint", "").splitlines()
    assert (
        f"note: {log} is there already; the lines of this run come after those that it has" in said
    )
    assert said[-1] == f"log: {log}; distclip report {log}" and len(lines(log)) == 8
    assert (
        train_here(*arguments, "--output.checkpoint", "", "--output.log", "").splitlines()[-1]
        == "log: none; --output.log FILE writes one"
    )


@pytest.mark.parametrize(
    "where",
    [["--inject.step", "6"], ["--inject.step", "2", "--inject.rank", "1"]],
    ids=["late", "nowhere"],
)
def test_an_injection_that_cannot_happen_is_told(where):
    said = train_here("--strategy", "single", *SMALL, "--inject.kind", "nan", *where)
    step, rank = where[1], where[3] if len(where) > 2 else 0
    assert (
        f"note: nothing is injected: inject.step={step} and inject.rank={rank}, and steps 0 to 5 "
        f"are taken by ranks 0 to 0\n" in said
    )


REFUSED = {
    "steps -3": (["--training.steps", "-3"], "training.steps=-3 must be at least 1: optimizer "
                                             "steps, those of a resumed run included"),
    "steps 0": (["--training.steps", "0"], "training.steps=0 must be at least 1: "),
    "batch 0": (["--training.batch", "0"], "training.batch=0 must be at least 1: sequences a step, "
                                           "over all ranks and micro-steps"),
    "accumulate 0": (["--training.accumulate", "0"], "training.accumulate=0 must be at least 1: "
                                                     "micro-steps a step"),
    "lr -1": (["--training.lr", "-1"], "training.lr=-1.0 must be finite and above 0: learning rate "
                                       "after warm-up"),
    "lr inf": (["--training.lr", ".inf"], "training.lr=inf must be finite and above 0: "),
    "warmup -1": (["--training.warmup", "-1"], "training.warmup=-1 must be at least 0: "),
    "every 0": (["--output.every", "0"], "output.every=0 must be at least 1: steps between "
                                         "checkpoints"),
    "batch 7": (
        ["--training.batch", "7", "--training.accumulate", "2"],
        "training.batch=7 does not divide by 1 parts of the batch x 2 micro-steps",
    ),
    "no number": (["--training.steps", "many"], "training.steps: expected int, got many"),
    "no value": (["--training.steps"], "argument --training.steps: expected one argument"),
    "no key": (["gpt"], "unrecognized arguments: gpt"),
    "no file": (["--config"], "--config: name a YAML file; configs/ holds some"),
    "threshold 0": (["--clip.threshold", "0"], "clip: max_norm=0 sets every gradient to zero"),
    "options": (
        ["--clip.mode", "zclip", "--clip.options.alpha", "x"],
        "clip: ZClip: alpha='x' must be between 0 and 1",
    ),
    "schedule": (
        ["--clip.mode", "scheduled", "--clip.options.schedule", "[[1]]"],
        "clip: Scheduled: schedule=[[1]] is neither a function nor points",
    ),
    "log": (["--output.log", "/"], "output.log='/' is a folder; name a file in it"),
    "checkpoint": (["--output.checkpoint", __file__], "is a file; name a folder"),
    "distclip's own": (
        ["--training.precision", "fp16", "--clip.on_nonfinite", "propagate", *SMALL],
        "propagate",
    ),
}  # fmt: skip


@pytest.mark.parametrize("arguments, words", REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(arguments, words, capsys):
    assert main_code("--strategy", "single", *arguments) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("train.py: ")]
    assert words in line


FILES = {
    "bad YAML": (b"training: [1\n b: }", " is no YAML: while parsing a flow sequence"),
    "bytes": (b"\xff\xfe\x00", " is no YAML: 'utf-8' codec can't decode byte 0xff"),
    "a list": (b"- 1\n- 2\n", " holds a list, not keys with values such as training: {lr: 0.1}"),
    "a text": (b"fsdp2\n", " holds a str, not keys with values such as training: {lr: 0.1}"),
    "a number": (
        b"training: 5\n",
        ": training is 5, not keys with values; leave it out, or write training: {...}",
    ),
    "nothing under it": (
        b"clip:\n",
        ": clip is None, not keys with values; leave it out, or write clip: {...}",
    ),
    "a number as key": (b"1: 2\n", ": unknown key '1'. The keys are: clip."),
    "a list as number": (b"training: {steps: [1]}\n", "training.steps: expected int, got [1]"),
}


@pytest.mark.parametrize("content, words", FILES.values(), ids=FILES)
def test_a_file_that_is_no_configuration_is_told(content, words, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    told = refused("--config", str(path))
    assert words in told and "\n" not in told and ("c.yaml" in told or "steps" in words)


def test_a_folder_as_configuration_is_told_and_an_empty_file_says_nothing(tmp_path):
    assert refused("--config", str(tmp_path)) == (
        f"--config {tmp_path}: Is a directory; configs/ holds some"
    )
    (tmp_path / "c.yaml").write_text("# all as it is\n")
    assert refused("--config", str(tmp_path / "c.yaml"), "--training.steps", "0").startswith(
        "training.steps=0 must be at least 1"
    )


def test_a_files_choice_can_be_taken_back_on_the_command_line(tmp_path):
    (tmp_path / "norm.yaml").write_text("clip: {mode: norm, threshold: 2.0}\n")
    (tmp_path / "zclip.yaml").write_text("clip: {mode: zclip, options: {alpha: 0.9}, warmup: 5}\n")
    norm, zclip = (
        ["--strategy", "single", *SMALL, "--config", str(tmp_path / f"{name}.yaml")]
        for name in ("norm", "zclip")
    )
    assert "leave it out (over a file: --clip.threshold null), or set clip.warmup too" in refused(
        *norm, "--clip.mode", "autoclip"
    )
    train_here(*norm, "--clip.mode", "autoclip", "--clip.threshold", "null")
    assert "(over a file: --clip.options {})" in refused(*zclip, "--clip.mode", "norm")
    assert "(over a file: --clip.warmup 0)" in refused(
        *zclip, "--clip.mode", "norm", "--clip.options", "{}"
    )
    log = tmp_path / "log.jsonl"
    train_here(
        *zclip,
        "--clip.mode",
        "norm",
        "--clip.options",
        "{}",
        "--clip.warmup",
        "0",
        "--output.log",
        str(log),
    )
    assert {row["threshold"][0] for row in lines(log)} == {1.0}


def test_help_describes_every_key(capsys):
    import config
    import strategies

    with pytest.raises(SystemExit, match="0"):
        config.read(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    keys = dict(config._leaves(config.Config))
    assert len(keys) > 20
    for key, (_, leaf) in keys.items():
        assert f"--{key} " in said and f"{leaf.metadata['help']} (type: " in said
    assert f"spread over ranks: {', '.join(strategies.NAMES)} (type" in said
    assert (
        "exit codes: 0 trained, 1 failed, 2 the configuration cannot be honoured, 130 ended by "
        "Ctrl-C" in said
    )


def test_what_deepspeeds_json_says_otherwise_is_told():
    """In one process, since each import of DeepSpeed takes seconds."""
    cases = (
        ([], "is no file; strategy: deepspeed needs DeepSpeed's JSON, and configs/deepspeed/ holds "
             "some"),
        (["--deepspeed", "configs/deepspeed/zero2.json", "--training.batch", "32"],
         "configs/deepspeed/zero2.json: train_micro_batch_size_per_gpu is 8, but training.batch=32 "
         "on 2 ranks in training.accumulate=1 "
         "micro-steps makes it 16; change one of them"),
        (["--deepspeed", "configs/deepspeed/zero1.json", "--training.batch", "16"],
         "configs/deepspeed/zero1.json is for bf16, and training.precision is fp32; change one of "
         "them"),
        (["--deepspeed", "configs/deepspeed/zero2.json", "--training.batch", "32", "--training.accumulate", "2"],
         "configs/deepspeed/zero2.json: gradient_accumulation_steps is 1, but training.batch=32 on "
         "2 ranks in training.accumulate=2"),
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


def actions(path):
    return [row["action"] for row in lines(path)]


LADDER = [
    "--strategy", "single", "--training.batch", "8", "--training.steps", "44", "--training.lr", "0.01",
    "--output.every", "9", "--inject.kind", "spike", "--inject.step", "38", "--inject.rank", "0",
    "--clip.escalate.window", "20",
]  # fmt: skip


def test_a_run_that_is_rolled_back_goes_on_as_if_it_had_never_seen_the_data(tmp_path):
    def run(name, *arguments):
        log, folder = tmp_path / f"{name}.jsonl", tmp_path / name
        return train_here(
            *LADDER, *arguments, "--output.log", str(log), "--output.checkpoint", str(folder)
        )

    rungs = ("--clip.escalate.skip", "1", "--clip.escalate.roll_back", "3")
    said = run("spoilt", "--inject.batches", "3", *rungs)
    assert "step 40: back to the checkpoint of step 36, without the batches 38, 39, 40" in said
    (tmp_path / "spared").mkdir()
    (tmp_path / "spared" / "left_out.json").write_text("[38, 39, 40]")
    run("spared", "--inject.kind", "none", *rungs)

    spoilt, spared = norms(tmp_path / "spoilt.jsonl"), norms(tmp_path / "spared.jsonl")
    assert actions(tmp_path / "spoilt.jsonl")[38:41] == ["skip", "skip", "roll_back"]
    assert len(spoilt) == 41 + 8 and len(spared) == 44
    assert spoilt[41:] == spared[36:] and min(spoilt[38:41]) > 100, "vacuous"
    assert set(actions(tmp_path / "spared.jsonl")) == {"none"}


def test_a_resumed_run_goes_on_at_the_lowered_rate(tmp_path):

    def run(name, steps, every):
        rungs = ("--clip.escalate.lower_lr", "2", "--clip.escalate.lower_for", "3")
        log, folder = tmp_path / f"{name}.jsonl", tmp_path / name
        return train_here(
            *LADDER, "--inject.kind", "nan", "--inject.batches", "2", *rungs,
            "--training.steps", steps, "--output.every", every,
            "--training.warmup", "100", "--training.lr", "0.05",  # with no decay, which ends with the steps
            "--output.log", str(log), "--output.checkpoint", str(folder),
        )  # fmt: skip

    assert "step 39: the learning rate is multiplied by 0.5 until step 43" in run(
        "whole", "44", "99"
    )
    run("parts", "41", "99")
    run("parts", "44", "99")
    whole, parts = norms(tmp_path / "whole.jsonl"), norms(tmp_path / "parts.jsonl")
    assert len(whole) == 44 and whole == parts
    assert json.loads((tmp_path / "whole" / "lowered.json").read_text()) == [[40, 43, 0.5]]


def test_a_rate_is_lowered_for_a_while(tmp_path):
    """And where there is no end to it, the run ends."""
    rungs = ("--clip.escalate.lower_lr", "2", "--clip.escalate.lower_for", "3")
    log = tmp_path / "log.jsonl"
    said = train_here(*LADDER, "--inject.batches", "2", *rungs, "--output.log", str(log))
    assert "step 39: the learning rate is multiplied by 0.5 until step 43" in said
    assert actions(log).count("lower_lr") == 1
    told = refused(
        *LADDER, "--inject.batches", "6", "--clip.escalate.roll_back", "2", "--clip.escalate.roll_backs", "1",
        "--output.checkpoint", str(tmp_path / "again"),
    )  # fmt: skip
    assert "step 39: the run was rolled back 1 times (clip.escalate.roll_backs)" in told
    assert "clip.escalate.roll_back=2 loads a checkpoint; name their folder" in refused(
        *LADDER, "--clip.escalate.roll_back", "2"
    )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_rank_that_is_off_is_found_in_the_log(ranks, tmp_path, strategy):
    """Each rank reads data of its own, and one has gradients that are 100 times as large."""
    if strategy == "fsdp2" and not hasattr(FSDPModule, "set_custom_reduce_scatter"):
        pytest.skip("a release that shows nothing")
    log = tmp_path / "log.jsonl"
    train_with(
        ranks, "--strategy", strategy, "--model", "gpt", "--data.name", "text", *SMALL, "--clip.rank_norms", "true",
        "--inject.kind", "rank", "--inject.step", "3", "--inject.rank", "2", "--output.log", str(log),
    )  # fmt: skip
    rows = [row for row in lines(log) if "rank_norms" in row]
    assert len(rows) == 6 and all(len(row["rank_norms"]) == 4 for row in rows)
    off = rows[3]
    assert off["outlier_rank"] == 2 and off["rank_deviation"] > 8
    assert off["rank_norms"][2] > 20 * max(n for i, n in enumerate(off["rank_norms"]) if i != 2)
    assert "clip.rank_norms: strategy='single' shows no rank's own gradients" in refused(
        "--strategy", "single", "--clip.rank_norms", "true"
    )
    assert "inject.kind='rank' has no part in strategy='tp'" in refused(
        "--strategy", "tp", "--inject.kind", "rank"
    )


def test_three_faults_of_one_run_are_told_apart_in_the_log(ranks, tmp_path):
    """As configs/unstable.yaml injects them, at earlier steps."""
    log, clean = tmp_path / "log.jsonl", tmp_path / "clean.jsonl"
    faults = [
        {"kind": "batch", "step": 45, "rank": 1},
        {"kind": "rank", "step": 50, "batches": 1, "rank": 2},
        {"kind": "layer", "step": 55, "weight": "blocks.1.out.weight"},
    ]
    arguments = [
        "--config", str(ROOT / "configs" / "unstable.yaml"), "--training.steps", "60", "--training.batch", "16",
        "--clip.escalate.lower_lr", "0", "--clip.escalate.skip", "0",
    ]  # fmt: skip
    train_with(ranks, *arguments, "--faults", json.dumps(faults), "--output.log", str(log))
    train_with(ranks, *arguments, "--faults", "[]", "--output.log", str(clean))
    rows, spared = lines(log), lines(clean)
    assert norms(log)[:45] == norms(clean)[:45]
    for at, rank in ((45, 1), (50, 2)):
        assert (rows[at]["matters"], rows[at]["outlier_rank"]) == ("outlier", rank)
        own = rows[at]["rank_norms"]
        assert own[rank] > 4 * max(other for i, other in enumerate(own) if i != rank)
        notes = [n["note"] for n in rows[at]["notes"] if (n["rank"], n["step"]) == (rank, at + 1)]
        assert notes == [{"batch": at, "samples": [4 * rank, 4 * rank + 3]}]
    off = rows[55]
    own = dict(zip(off["layers"], off["layer_norms"], strict=True))
    # the window still holds the warm-up's norms
    assert off["matters"] in ("outlier", "largest")
    assert max(own, key=own.__getitem__) == "blocks.1"
    by_rank = off["rank_norms"]
    assert max(by_rank) < 2 * min(by_rank), "all of them, though of four one lies off by chance"
    assert {n["rank"] for n in off["notes"] if n["step"] == 56} == {0, 1, 2, 3}
    for at in (45, 50, 55):
        assert rows[at]["total_norm"] > 4 * spared[at]["total_norm"], "vacuous"
    assert rows[56]["total_norm"] < 2 * spared[56]["total_norm"], "the weight is what it was"


def test_a_fault_that_cannot_be_is_refused():
    layer = ("--strategy", "single", "--inject.kind", "layer")
    assert "a weight is named for kind layer" in refused(*layer)
    assert "inject.weight='x': the parameters are rnn.weight_ih_l0" in refused(
        *layer, "--inject.weight", "x"
    )
    assert "inject.kind='layer' has no part in strategy='tp'" in refused(
        "--strategy", "tp", "--faults", '[{"kind": "layer", "weight": "x"}]'
    )
    assert "faults" in refused("--faults", '[{"kind": "fire"}]')
