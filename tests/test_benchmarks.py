"""`python -m benchmarks --quick` runs, and its table, JSON, picture and Markdown hold what they
should. Nothing here is about times."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.__main__ import MARKS
from benchmarks.cases import CASES
from benchmarks.floors import CEILINGS, FLOORS, ceiling, floor
from benchmarks.plot import draw
from benchmarks.records import Row, Spread
from benchmarks.scaling import block
from benchmarks.table import text
from benchmarks.worlds import held_by, world

ROOT = Path(__file__).parents[1]


# each way of building a clipper that the cases have, and what follows inner names; with the others
# it takes minutes
QUICK = ("overhead", "fsdp2", "groups", "setup", "tiny", "watching")


def benchmarks(*arguments, check=True):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def row(value, floor=1.0, issue=False, at_least=True, q3=None):
    spread = Spread(value, value, q3 or value, 3)
    return Row(
        "gpt2",
        "fp32 idle",
        spread,
        "x",
        "own",
        "peer",
        spread,
        spread,
        floor,
        at_least,
        issue,
        main=True,
    )


def test_quick_cases_end_in_a_table_json_a_picture_and_markdown(tmp_path):
    target, plot, page = tmp_path / "out.json", tmp_path / "out.png", tmp_path / "RESULTS.md"
    done = benchmarks(
        *QUICK,
        "--quick",
        "--kernels",
        "torch",
        "--json",
        target,
        "--plot",
        plot,
        "--write",
        page,
    )
    found = json.loads(target.read_text())
    assert {r["case"] for r in found["rows"]} == set(QUICK)
    assert {r["kernels"] for r in found["rows"]} == {"torch"}
    machine = found["machine"]
    assert (
        machine["torch"].startswith("2.") and machine["cores"] >= 1 and machine["read_gb_s"][0] > 0
    )
    rows = [Row.from_dict(record) for record in found["rows"]]
    sharded = [r for r in rows if r.case == "fsdp2"]
    assert {(r.what, r.ranks, r.threads) for r in sharded} == {
        ("10 parameters, idle", 2, 1),
        ("10 parameters, active", 2, 1),
    }
    assert {r.peer for r in sharded} == {
        "torch clip_grad_norm_",
        "torch clip_grad_norm_(foreach=True)",
        "torchtitan's recipe",
    }
    for r in rows:
        rounds = 3 if r.case in ("overhead", "fsdp2") else 1  # of first calls, or the least of many
        assert r.value.n >= rounds and r.value.q1 <= r.value.median <= r.value.q3
        assert not r.peer or (
            r.peer_s.median > 0
            and r.ours_s.median > 0
            and r.verdict in ("reached", "level", "not reached", "")
        )
    assert all("the message of" in r.note for r in sharded)
    for said in (
        "GB/s",
        "2 x 1",
        "torchtitan's recipe",
        ">= 1.00 (peer)",
        "--quick",
        "floors reached",
    ):
        assert said in done.stdout, done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "| `GradClipper.clip_` | torchtitan's recipe |" in page.read_text()

    again = benchmarks("fsdp2", "--read", target)  # no measurement
    assert "torchtitan's recipe" in again.stdout and "overhead" not in again.stdout


def test_verdicts():
    assert [row(v, 2.2, issue=True).verdict for v in (2.3, 2.2, 2.1)] == [
        "reached",
        "reached",
        "not reached",
    ]
    # quartiles do not excuse a floor that was set
    assert row(2.1, 2.2, issue=True, q3=2.5).verdict == "not reached"
    assert [row(v, q3=q3).verdict for v, q3 in ((1.1, 1.2), (0.99, 1.01), (0.9, 0.95))] == [
        "reached",
        "level",
        "not reached",
    ]
    assert [row(v, 1.25, issue=True, at_least=False).verdict for v in (1.2, 1.3)] == [
        "reached",
        "not reached",
    ]
    assert row(5.0, None).verdict == ""


def test_floors_depend_on_the_kernels_and_are_all_for_cases_that_exist():
    assert floor("gpt2 bf16 active", "torch") == {"floor": 0.9, "issue": True}
    assert floor("gpt2 bf16 active", "native") == {"floor": 2.0, "issue": True}
    assert floor("something else", "native") == {"floor": 1.0, "issue": False}
    assert floor("fsdp1 1000 on 4", "torch") == {"floor": 1.0, "issue": False}
    assert ceiling("1,000 parameters", "torch") == {"floor": 3.0, "issue": True, "at_least": False}
    sources = "".join(
        path.read_text() for path in (ROOT / "benchmarks").glob("*.py") if path.name != "floors.py"
    )
    named = [key for key in CEILINGS if f'"{key}"' not in sources]
    assert named == []
    assert {key.split()[0] for key in FLOORS} - set(CASES) == {"unscale", "clip", "first", "share"}


def test_a_spread_is_median_and_quartiles():
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)
    assert Row.from_dict(row(1.5).to_dict()) == row(1.5)


def test_wrong_arguments_are_told_with_what_to_do():
    unknown = benchmarks("gtp2", check=False)
    assert (
        unknown.returncode == 1
        and "there is no case 'gtp2'; the cases are gpt2, small" in unknown.stderr
    )
    with pytest.raises(SystemExit, match="none was measured"):
        draw([], Path("unused.png"))


def test_the_page_on_scaling_is_the_block_that_a_run_writes():
    page = (ROOT / "docs" / "scaling.md").read_text()
    before, rest = page.split(MARKS[0])
    assert MARKS[1] in rest
    # what stands outside the block has no figures of its own
    assert re.findall(r"\d+", re.sub("FSDP[12]|1-D|float64", "", before)) == []
    link = {"name": "a", "alpha": 1e-6, "beta": 1e-9, "base": 0.0, "source": "b"}
    empty = {
        "gloo": {"samples": [], "link": link},
        "links": [],
        "predictions": [],
        "extra": 3,
        "kernels": "torch",
    }
    written = block(
        empty
        | {key: [] for key in ("worlds", "arithmetic", "declared", "weights", "calls", "units")}
    )
    assert [line for line in written.splitlines() if line.startswith("#")] == [
        line for line in rest.splitlines() if line.startswith("#")
    ]


def test_no_size_on_the_page_on_scaling_is_negative():
    assert re.findall(r"\| -\d", (ROOT / "docs" / "scaling.md").read_text()) == []


def test_what_a_plan_keeps_is_counted_by_object():
    assert held_by([]) == sys.getsizeof([])
    shared = bytes(1000)
    assert held_by([shared, shared]) == sys.getsizeof([shared, shared]) + sys.getsizeof(shared)
    assert held_by([torch.zeros(1000, dtype=torch.float64)]) == pytest.approx(8000, abs=200)
    few, many = (world("sharded, equal tables", 2, count, False)["kept"] for count in (10, 100))
    assert 90 * 100 < many - few < 90 * 1000, "some hundred bytes a parameter"


def test_distclip_does_not_know_its_benchmarks():
    assert [
        path
        for path in (ROOT / "src").rglob("*.py")
        if "import benchmarks" in path.read_text() or "from benchmarks" in path.read_text()
    ] == []


def test_the_table_lines_up():
    machine = {
        "cpu": "X",
        "cores": 2,
        "memory_gib": 4,
        "torch": "2.13",
        "python": "3",
        "read_gb_s": [1.0, 1.0, 1.0],
        "bandwidth_threads": 2,
    }
    said = text(machine, [row(1.5), row(2.5, 2.2, issue=True)], quick=False)
    assert (
        "X, 2 cores, 4 GiB; torch 2.13, Python 3; reads 1.0 GB/s (1.0-1.0) with 2 threads" in said
    )
    assert (
        ">= 2.20" in said
        and "1 of 1 floors reached; of 1 other comparisons 0 slower than the peer" in said
    )
