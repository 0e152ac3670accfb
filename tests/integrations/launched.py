"""Starts the example scripts as their users would, and reads what each rank printed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"


def launched(script, *args, ranks=2, timeout=900):
    """What each rank printed behind `RESULT `; an AssertionError with the output's end where the
    job failed."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks
        else []
    )
    environment = os.environ | {
        "PYTHONPATH": f"{SOURCE}{os.pathsep}{HERE.parent}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, *launcher, str((HERE / script).resolve()), *args]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )
    assert done.returncode == 0, (
        f"{' '.join(command)} ended with "
        f"{done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    )
    rows = [json.JSONDecoder().raw_decode(part)[0] for part in done.stdout.split("RESULT ")[1:]]
    assert len(rows) == max(1, ranks), done.stdout[-3000:]
    return rows


def assert_passed(seen, results):
    """What doctor_jobs.py saw of a framework's job: these results, and nothing is left of it."""
    assert seen["right"]["results"] == results, seen
    assert (seen["right"]["code"], seen["right"]["stopped"]) == (0, "")
    assert not seen["left"] and not seen["group"]


def assert_as_the_oracle(rows, case):
    """Every rank's norm and update are those of float64 in one process, by one all-reduce."""
    for row in rows:
        seen = row[case]
        assert seen["norm"] > 0.1, "vacuous"
        assert seen["told"] == pytest.approx(seen["norm"], rel=1e-6)
        assert seen["off"] <= 1e-6
        assert len(seen["sent"]) == 1
    assert len({row[case]["bits"] for row in rows}) == 1
