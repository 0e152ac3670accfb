"""The programs of examples/ run as they stand: torch's own in two ranks of a pool, those of
frameworks by torchrun, as a user starts them."""

import gc
import os
import re
import runpy
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

import skips
from distclip.testing import World

EXAMPLES = Path(__file__).parents[2] / "examples"
# what rank 0 prints, and how often; rank 1 prints the same lines where `both` is said
PLAIN = {
    "accumulation": (r"step +\d: norm of the mean \d.*, times 0\.\d+", 5),
    "amp": (r"rank 0: skipped (False, scale 1024|True, scale 512|False, scale 512)", 6),
    "ddp": (r"step +\d+: loss .*, norm .*, times 0\.\d+", 10),
    "experts": (r"step \d, rank 0: its expert after clipping 0\.\d+, norm \d.*", 5),
    "fsdp2": (r"step \d, rank 0: norm of the shards here \d.*, of all \d.*", 5),
    "fsdp2_tp": (r"norm (\d\.\d{5}); of the model that is not shared out \1", 1),
    "own_policy": (r"step +\d+: norm .*, threshold +(inf|[\d.]+), (clipped|as it is)", 10),
    "pipeline": (r"step \d, stage 0: norm 0\.\d+, of all 0\.\d+, times 0\.\d+", 5),
    "resume_other_world_size": (r"on two ranks (step \d: .*)\non one rank  \1", 3),
}
FRAMEWORKS = {
    "with_accelerate": (r"step +\d+: loss .*, norm .*, times 0\.\d+", 10),
    "with_deepspeed": (r"step +\d+: loss .*, norm .*, times (0\.\d+|1\.000)", 10),
    "with_lightning": (r"step +\d+: loss .*, norm .*, times 0\.\d+", 10),
    "with_trainer": (r"\{.*'clip_coef': '?0\.\d+'?.*\}", 10),
}


def test_each_is_run_and_short():
    here = {path.stem for path in EXAMPLES.iterdir() if path.suffix == ".py"}
    assert here == PLAIN.keys() | FRAMEWORKS.keys() and len(here) == 13
    for name in here:
        text = (EXAMPLES / f"{name}.py").read_text()
        assert 20 <= len(text.splitlines()) <= 60, name
        assert f"torchrun --standalone --nproc-per-node 2 examples/{name}.py" in text
        own = re.findall(r"^(?:from|import) (\w+)", text, re.M)
        assert not {"tests", "launch", "examples"} & set(own), "it stands alone"


@pytest.fixture(scope="module")
def two():
    with World(2) as world:
        yield world


@skips.told(0)
def printed(name):
    """All but the two lines that make and end the process group, which the pool has."""
    said = StringIO()
    with redirect_stdout(said), warnings.catch_warnings():
        # torch says so of each checkpoint that one process of several loads
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="example")["main"]()
    gc.collect()
    return said.getvalue()


@pytest.mark.parametrize("name", PLAIN)
def test_torchs_own(two, name):
    said, other = two.run(printed, name, timeout=120)
    pattern, count = PLAIN[name]
    assert len(list(re.finditer(rf"^{pattern}$", said, re.M))) == count, said
    if name == "amp":
        for text in (said, other):
            assert text.count("skipped True, scale 512") == 1, "both ranks skipped the same step"
    if name in ("fsdp2", "experts", "pipeline"):
        ends = [
            re.findall(r"(?:of all|norm) (\d\S*?),?(?: times.*)?$", t, re.M) for t in (said, other)
        ]
        assert ends[0] == ends[1] and len(ends[0]) == 5, "one norm on both ranks"
    if name == "own_policy":
        assert said.count(" clipped") == 1 and "step  6: " in said


def launched(name):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    environment = os.environ | {
        "PYTHONPATH": str(EXAMPLES.parent / "src"),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [*command, str(EXAMPLES / f"{name}.py")],
        capture_output=True, text=True, timeout=600, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_of_frameworks(name):
    pattern, count = FRAMEWORKS[name]
    said = launched(name)
    assert len(list(re.finditer(rf"^{pattern}$", said, re.M))) == count, said
