"""Each script of launch/ as its users start it, on one machine; two nodes are two agents on the
loopback."""

import os
import shutil
import signal
import socket
import time

import pytest

from launch.programs import ROOT, begin, ended, launched, lines

SMALL = ("--training.steps", "4", "--training.batch", "16", "--output.checkpoint", "")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def test_two_nodes(tmp_path):
    log, port = tmp_path / "log.jsonl", free_port()
    nodes = [
        begin(
            ["launch/torchrun.sh", "--config", "configs/hsdp.yaml", *SMALL, "--output.log", log, "--clip.threshold", "0.5"],
            NNODES="2", NODE_RANK=str(node), NPROC="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )
        for node in (0, 1)
    ]  # fmt: skip
    results = [ended(node) for node in nodes]
    for code, said in results:
        assert code == 0, said[-6000:]
    said = "".join(said for _, said in results)
    assert "over 4 ranks" in said
    assert (
        "bits of the coefficients of 4 steps: " in said
        and ", equal on all ranks" in said
        and "NOT EQUAL" not in said
    )
    assert len(lines(log)) == 4 and all(row["clipped"] for row in lines(log)), "vacuous"


def test_deepspeeds_launcher(tmp_path):
    log = tmp_path / "log.jsonl"
    code, said = launched(
        [
            "launch/deepspeed.sh",
            "--config",
            "configs/deepspeed_zero2.yaml",
            *SMALL,
            "--output.log",
            log,
        ],
        MASTER_PORT=free_port(),
    )
    assert code == 0, said[-6000:]
    assert "over 2 ranks" in said and ", equal on all ranks" in said and len(lines(log)) == 4


NEEDS = {
    "torchrun": (["launch/torchrun.sh"], {}, "say what to train: launch/torchrun.sh --config "
                                             "configs/fsdp2.yaml"),
    "torchrun on nodes": (
        ["launch/torchrun.sh", "--config", "configs/ddp.yaml"], {"NNODES": "2"},
        "NNODES=2 needs MASTER_ADDR (the node of rank 0) and NODE_RANK (0 there)",
    ),
    "accelerate": (["launch/accelerate.sh"], {}, "nothing is no file; the first argument is "
                                                 "Accelerate's configuration"),
    "accelerate's file": (["launch/accelerate.sh", "--config", "x"], {}, "--config is no file; the "
                                                                         "first argument is "
                                                                         "Accelerate's"),
    "accelerate on nodes": (
        ["launch/accelerate.sh", "configs/accelerate/ddp.yaml"], {"NNODES": "2"},
        "NNODES=2 needs MASTER_ADDR (the node of rank 0), MASTER_PORT and NODE_RANK (0 there)",
    ),
    "deepspeed": (["launch/deepspeed.sh"], {}, "say what to train: launch/deepspeed.sh --config "
                                               "configs/deepspeed_zero2.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("command, environment, words", NEEDS.values(), ids=NEEDS)
def test_what_is_missing_is_told(command, environment, words):
    code, said = launched(command, **environment)
    assert code == 1 and words in said


REFUSING = {
    "torchrun": (["launch/torchrun.sh"], {}),
    "accelerate": (
        [
            "launch/accelerate.sh",
            "configs/accelerate/ddp.yaml",
            "--config",
            "configs/accelerate.yaml",
        ],
        {},
    ),
    "deepspeed": (
        ["launch/deepspeed.sh", "--config", "configs/deepspeed_zero2.yaml"],
        {"MASTER_PORT": "free"},
    ),
}


@pytest.mark.parametrize("command, environment", REFUSING.values(), ids=REFUSING)
def test_a_slip_is_one_line_of_one_rank(command, environment):
    environment = {name: free_port() for name in environment}
    code, said = launched([*command, "--training.lr", "-1"], NPROC="2", **environment)
    own = [
        line
        for line in said.splitlines()
        if line and "[INFO]" not in line and "launch.py:" not in line and "[WARNING]" not in line
    ]
    assert (
        own
        == ["train.py: training.lr=-1.0 must be finite and above 0: learning rate after warm-up"]
        and code == 2
    ), said


def test_a_slip_that_only_all_ranks_together_can_see_is_one_line_too():
    code, said = launched(["launch/torchrun.sh", "--training.batch", "7"], NPROC="2")
    assert (code, said) == (
        2,
        "train.py: training.batch=7 does not divide by 2 parts of the batch x 1 micro-steps\n",
    )


def test_which_rank_failed_first_is_one_line_below_its_own_words():
    arguments = [
        "--inject.kind",
        "nan",
        "--inject.step",
        "1",
        "--clip.on_nonfinite",
        "raise",
        "--training.steps",
        "3",
    ]
    code, said = launched(["launch/torchrun.sh", *arguments], NPROC="2")
    assert code == 1 and "NonFiniteError" in said
    last = said.splitlines()[-1]
    assert last.startswith("launch: rank ") and last.endswith(
        " ended first, with exit code 1; what it said stands above"
    )
    assert "ChildFailedError" not in said and "torch/distributed/elastic" not in said


INTERRUPTED = {
    "torchrun": (["launch/torchrun.sh", "--config", "configs/ddp.yaml"], {}),
    "accelerate": (REFUSING["accelerate"][0], {}),
}  # DeepSpeed's launcher ends its ranks by itself, at times before they can say a word


@pytest.mark.parametrize("command, environment", INTERRUPTED.values(), ids=INTERRUPTED)
def test_ctrl_c_is_one_line(command, environment, tmp_path):
    """SIGINT to the whole group of processes, as a terminal sends it, once steps are taken."""
    log = tmp_path / "log.jsonl"
    environment = {name: free_port() for name in environment}
    to = [
        "--training.steps",
        "1000000",
        "--output.log",
        log,
        "--output.checkpoint",
        tmp_path / "checkpoint",
    ]
    process = begin([*command, *to], NPROC="2", **environment)
    try:
        while not log.exists() and process.poll() is None:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
    finally:
        code, said = ended(process)
    assert code == 130, said[-4000:]
    ends = (
        f"train.py: ended by Ctrl-C; the same line goes on from the latest checkpoint in "
        f"{tmp_path / 'checkpoint'}"
    )
    assert said.splitlines().count(ends) == 1 and "Traceback" not in said, said[-4000:]
    assert len(said[said.index(ends) :].splitlines()) <= 6, "and what a launcher says of itself"


@pytest.mark.parametrize("name", ["torchrun", "accelerate", "deepspeed"])
def test_a_launcher_that_is_not_installed_is_told(tmp_path, name):
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / f"{name}.sh", tmp_path / "launch")
    for program in ("bash", "dirname", "env"):
        (tmp_path / program).symlink_to(shutil.which(program))
    code, said = launched([tmp_path / "launch" / f"{name}.sh", "--config", "x"], PATH=str(tmp_path))
    assert (
        code == 1
        and f"launch/{name}.sh: {name} was not found; run launch/" in said
        and "pip install -e '.[dev]'" in said
    )


def test_the_scripts_are_short():
    for name in ("torchrun", "accelerate", "deepspeed"):
        script = ROOT / "launch" / f"{name}.sh"
        assert len(script.read_text().splitlines()) <= 25 and os.access(script, os.X_OK)
        assert script.read_text().count("launch/train.py") >= 1
