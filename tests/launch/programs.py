"""Starts the training program: as its users do, and in the ranks of the tests' pool, where starting
costs nothing."""

import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def launched(command, timeout=900, **environment):
    """Return code and output of a command in the project's root; it and all its children are ended
    after `timeout` seconds."""
    process = begin(command, **environment)
    return ended(process, timeout)


def interruptible():
    """In the child: a shell that put the tests into the background has turned SIGINT off for all
    that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def begin(command, **environment):
    command = [str(part) for part in command]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True,
        env=ENVIRONMENT | environment, preexec_fn=interruptible,
    )  # fmt: skip


def ended(process, timeout=900):
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, said


def start(*arguments, ranks=2):
    launcher = (
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
        ]
        if ranks
        else [sys.executable]
    )
    return launched([*launcher, ROOT / "launch" / "train.py", *arguments])


def train_here(*arguments):
    """In this process, which is a rank of a process group or alone. What rank 0 says."""
    return _here(lambda train, config: train.train(config.read(arguments), "cpu"))


def main_here(*arguments):
    """The whole program in this process."""
    return _here(lambda train, config: train.run(train.configured(arguments)))


def main_code(*arguments):
    """The same, with the exit code that it would have; what it refuses goes to stderr."""
    codes = []
    before = signal.getsignal(signal.SIGINT)
    try:
        _here(lambda train, config: codes.append(train.main(arguments)))
    finally:
        signal.signal(signal.SIGINT, before)
    return codes[0]


def _here(run):
    sys.path.insert(0, str(ROOT / "launch"))
    try:
        import config
        import train

        said = StringIO()
        with redirect_stdout(said):
            run(train, config)
        return said.getvalue()
    finally:
        sys.path.remove(str(ROOT / "launch"))


def train_with(ranks, *arguments):
    """`train_here` on the pool's ranks; what rank 0 says."""
    return ranks.run(train_here, *arguments)[0]


def lines(path):
    """Those of a log's steps."""
    rows = map(json.loads, path.read_text().splitlines())
    return [row for row in rows if "distclip_log" not in row]


def norms(path):
    return [row["total_norm"] for row in lines(path)]
