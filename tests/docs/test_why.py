"""docs/why: each script shows a wrong number of what is usual, and the right one of distclip; README
and page say these numbers."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = {p.stem for p in (ROOT / "docs" / "why").glob("*.py")} - {"__main__", "showing"}


def rows(page):
    """By script: the right number and the numbers of the ranks, as a table of `page` says them."""
    found = {}
    for line in (ROOT / page).read_text().splitlines():
        script = re.search(r"why/(\w+)\.py", line)
        if line.startswith("|") and script:
            right, wrong = re.findall(r"\| ([\d.]+) \| ([\d., ]+?) \|", line)[0]
            found[script[1]] = (right, wrong.split(", "))
    return found


def numbers(seen, name):
    """Of every rank; one number where all are equal."""
    told = [f"{rank[name]:.4g}" for rank in seen]
    return told[:1] if len(set(told)) == 1 else told


def test_the_scripts_and_what_is_said_of_them():
    for framework in ("accelerate", "deepspeed"):
        if find_spec(framework) is None:
            pytest.skip(f"{framework} is not installed")
    settings = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "docs/why", "--json"], cwd=ROOT, env=os.environ | settings,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == SCRIPTS
    readme, page = rows("README.md"), rows("docs/why.md")
    assert readme == page and set(page) == SCRIPTS
    for script, seen in found.items():
        right, other, ours = seen[0]
        assert (right, ours) == ("right", "distclip")
        for rank in seen:
            assert rank[ours] == pytest.approx(rank[right], rel=1e-3, abs=0), script
        assert any(abs(rank[other] - rank[right]) > 0.1 * rank[right] for rank in seen), script
        assert page[script] == (f"{seen[0][right]:.4g}", numbers(seen, other)), script


def test_what_a_script_prints():
    """As a user runs one."""
    settings = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "docs/why/stages.py"], cwd=ROOT, env=os.environ | settings,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines == [
        ["rank", "0", "rank", "1"], ["right", "5", "5"], ["torch", "3", "4"], ["distclip", "5", "5"],
    ]  # fmt: skip
