"""launch/matrix.sh and the page that it writes: every number from what pytest wrote down."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import distclip.integrations
from distclip import versions
from launch.programs import ROOT

PYTEST_INI = "[pytest]\naddopts = --import-mode=importlib\n"
TESTS = """
import pytest

def test_right(): pass
def test_also_right(): pass
def test_wrong(): assert 1 == 2
@pytest.fixture
def broken(): raise ValueError
def test_without_its_fixture(broken): pass
@pytest.mark.skip(reason="not on this torch")
def test_left_out(): pass
@pytest.mark.skip(reason="not on this torch")
def test_left_out_too(): pass
"""
ACCELERATE = "def test_one(): pass\ndef test_two(): pass\ndef test_three(): assert 0\n"
LIGHTNING = "import pytest\npytest.importorskip('no_such_package')\ndef test_one(): pass\n"
FOLDERS = (
    "parity", "precision", "policies", "faults", "setup", "measure", "decide", "apply", "report",
    "torch_internals", "kernels", "integrations", "cli",
)  # fmt: skip


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location(
        "compatibility", ROOT / "launch" / "compatibility.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path):
    """A project with these tests, and an environment of a release that is this interpreter."""
    for folder in FOLDERS:
        (tmp_path / "tests" / folder).mkdir(parents=True)
    (tmp_path / "launch").mkdir()
    (tmp_path / "docs").mkdir()
    for name in ("matrix.sh", "compatibility.py"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "launch")
    (tmp_path / "pytest.ini").write_text(PYTEST_INI)
    (tmp_path / "tests" / "test_all.py").write_text(TESTS)
    (tmp_path / "tests" / "cli" / "test_doctor.py").write_text("def test_it(): pass\n")
    (tmp_path / "tests" / "integrations" / "test_accelerate.py").write_text(ACCELERATE)
    (tmp_path / "tests" / "integrations" / "test_lightning.py").write_text(LIGHTNING)
    environment(tmp_path, "9.9.0")
    return tmp_path


def environment(tree, release):
    programs = tree / ".venvs" / release / "bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "python").chmod(0o755)
    needs = next(
        line
        for line in (ROOT / "launch" / "matrix.sh").read_text().splitlines()
        if line.startswith("needs=")
    )
    (programs.parent / "installed").write_text(f"torch=={release} " + needs.split('"')[1])


def matrix(tree, *arguments, **variables):
    command = [tree / "launch" / "matrix.sh", *arguments]
    settings = {
        k: v for k, v in os.environ.items() if k not in ("PYTHON", "LIMIT", "TESTS")
    } | variables
    return subprocess.run(
        command, capture_output=True, text=True, timeout=900, check=False, env=settings
    )


def test_counts_come_from_the_run(tree, page):
    done = matrix(tree, "--keep", "9.9.0")
    assert done.returncode == 1, done.stdout + done.stderr  # tests failed
    rows = json.loads((tree / "docs" / "compatibility.json").read_text())
    row = rows["9.9.0"]
    assert row["counts"] == {"passed": 3, "failed": 2, "skipped": 2}
    assert (
        row["frameworks"]["accelerate"] == {"passed": 2, "failed": 1}
        and row["frameworks"]["deepspeed"] == {}
    )
    assert row["failures"] == [
        "tests.integrations.test_accelerate::test_three", "tests.test_all::test_without_its_fixture", "tests.test_all::test_wrong",
    ]  # fmt: skip
    assert row["skipped"]["not on this torch"] == 2 and row["stopped"] == ""
    assert row["python"] == sys.version.split()[0]
    text = (tree / "docs" / "compatibility.md").read_text()
    assert text == page.page(rows)
    line = next(line for line in text.splitlines() if line.startswith("| 9.9.0 "))
    assert line.startswith(f"| 9.9.0 | {row['python']} | 3 | 2 | 2 | ") and line.endswith(
        f" | {row['date']} |"
    )
    assert (
        "* failed: `tests.test_all::test_wrong`" in text
        and "* 2 skipped: not on this torch" in text
    )
    assert (tree / ".venvs" / "9.9.0").exists(), "it was to be kept"


def test_other_rows_stay_and_environments_go(tree, page):
    old = {
        "counts": {"passed": 7, "failed": 0, "skipped": 0},
        "python": "3.10.1",
        "date": "2020-01-01",
        "failures": [],
        "skipped": {},
    }
    old |= {
        "versions": dict.fromkeys(page.FRAMEWORKS, ""),
        "frameworks": {name: {} for name in page.FRAMEWORKS},
        "stopped": "",
    }
    page.add(tree / "docs" / "compatibility.md", "9.10.0", old)
    (tree / "tests" / "test_all.py").write_text("def test_right(): pass\n")
    (tree / "tests" / "integrations" / "test_accelerate.py").write_text("def test_one(): pass\n")
    done = matrix(tree, "9.9.0")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tree / "docs" / "compatibility.json").read_text())
    assert (
        list(rows) == ["9.9.0", "9.10.0"]
        and rows["9.10.0"] == old
        and rows["9.9.0"]["counts"]["passed"] == 2
    )
    text = (tree / "docs" / "compatibility.md").read_text()
    assert (
        "| 9.10.0 | 3.10.1 | 7 | 0 | 0 | not run | not run | not run | not run | 2020-01-01 |"
        in text
    )
    assert not (tree / ".venvs" / "9.9.0").exists() and not (tree / ".venvs" / "9.9.0.xml").exists()
    environment(tree, "9.9.0"), environment(tree, "9.10.0")
    done = matrix(tree)  # those of the page
    assert (
        done.returncode == 0
        and done.stdout.count("== torch 9.9.0") == done.stdout.count("== torch 9.10.0") == 1
    ), done.stdout


def test_a_run_that_is_ended_says_so(tree):
    (tree / "tests" / "test_all.py").write_text(
        "import time\ndef test_right(): pass\ndef test_slow(): time.sleep(3600)\n"
    )
    done = matrix(tree, "--keep", "9.9.0", LIMIT="30")
    assert done.returncode == 1
    row = json.loads((tree / "docs" / "compatibility.json").read_text())["9.9.0"]
    assert row["stopped"] == "ended by the time limit", row
    assert "(ended by the time limit) |" in (tree / "docs" / "compatibility.md").read_text()


def test_a_selection_of_ones_own_leaves_the_page(tree):
    done = matrix(tree, "--keep", "9.9.0", TESTS="tests/cli")
    assert (
        done.returncode == 0 and "1 passed" in done.stdout and not list((tree / "docs").iterdir())
    )


def test_a_python_that_is_not_there(tree):
    done = matrix(tree, "9.9.0", PYTHON="python0.1")
    assert done.returncode == 1 and done.stderr == (
        "launch/matrix.sh: python0.1 was not found; set PYTHON to Python 3.10 or later\n"
    )


def test_the_projects_page_is_what_its_data_says(page):
    assert page.PAGE == ROOT / "docs" / "compatibility.md"
    rows, found = page.rows_of(page.PAGE), page.programs_of(page.PAGE)
    assert page.PAGE.read_text() == page.page(rows, found)


def test_every_framework_has_a_row_and_its_tests_are_there(page):
    assert set(page.INTEGRATIONS) == set(dir(distclip.integrations)) - {
        name for name in dir(distclip.integrations) if name.startswith("__")
    }
    for name, one in page.INTEGRATIONS.items():
        assert one.tests == f"test_{name}.py"
        assert (ROOT / "tests" / "integrations" / one.tests).exists()


def test_programs_numbers_come_from_the_run(tmp_path, page):
    told = {
        "ranks": 2, "versions": {"torchtitan": "0.3.0"}, "steps": 20, "lines": 2,
        "losses": 3.2e-7, "norms": None,
    }  # fmt: skip
    value = json.dumps(told).replace('"', "&quot;")
    (tmp_path / "results.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.programs.test_programs" '
        f'name="test_it[titan]"><properties><property name="program" value="{value}"/>'
        '</properties></testcase><testcase classname="tests.integrations.test_torchtitan" '
        'name="test_one"><failure/></testcase></testsuite></testsuites>'
    )
    (tmp_path / "compatibility.json").write_text("{}")
    found = page.programs_found(tmp_path / "results.xml", 1)
    assert found["programs"] == {"titan": told | {"result": "passed"}}
    assert found["frameworks"]["torchtitan"]["failed"] == 1
    page.add_programs(tmp_path / "compatibility.md", found)
    text = (tmp_path / "compatibility.md").read_text()
    assert "| torchtitan 0.3.0 | 2 | 2 | 20 | 3e-07 | not told | passed |" in text
    assert "* failed: `tests.integrations.test_torchtitan::test_one`" in text
    assert text.count("(../tests/integrations/test_torchtitan.py) | 0.3.0 |") == 1


def test_the_readmes_status_is_what_the_data_says(page):
    readme = (ROOT / "README.md").read_text()
    (line,) = page.STATUS.findall(readme)
    assert line == page.status(page.rows_of(page.PAGE), ROOT)
    assert all(release in line for release in versions.RUN)


def test_the_status_names_what_failed_and_is_written_with_the_page(tree, page):
    for name in ("README.md", "constraints.txt", "benchmarks/results_gpu.json"):
        (tree / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    rows = page.rows_of(page.PAGE)
    passed = rows["2.9.1"]
    page.add(tree / "docs" / "compatibility.md", "2.9.1", passed | {"python": "3.10.1"})
    page.add(tree / "docs" / "compatibility.md", "2.99.0", passed | {"failures": ["test_one"]})
    (line,) = page.STATUS.findall((tree / "README.md").read_text())
    assert "torch 2.9.1 (Python 3.10; Linux" in line and "Some fail with 2.99.0." in line
    before = (ROOT / "README.md").read_text()
    assert page.STATUS.sub("", (tree / "README.md").read_text()) == page.STATUS.sub("", before)


def test_the_page_has_the_releases_that_are_said_to_be_run(page):
    rows = page.rows_of(page.PAGE)
    (pinned,) = re.findall(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert set(versions.RUN) == {*rows, pinned}, (
        "launch/matrix.sh, or launch/test.sh, ran others than src/distclip/versions.py says"
    )
    for release, row in rows.items():
        assert row["counts"]["passed"] > 1000 and row["failures"] == [] and not row["stopped"], (
            release
        )


def test_the_core_alone(tree):
    for name in ("test_reference", "test_native", "test_triton", "test_step_kernels"):
        (tree / "tests" / "kernels" / f"{name}.py").write_text("def test_it(): pass\n")
    (tree / "tests" / "test_all.py").write_text("def test_right(): pass\n")
    done = matrix(tree, "--core", "--keep", "9.9.0")
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads((tree / "docs" / "compatibility.json").read_text())["9.9.0"]
    assert row["core"] and row["counts"]["passed"] == 5 and not any(row["frameworks"].values())
    assert (
        f"| 9.9.0 | {row['python']} | 5 (core) | 0 | 0 | not run |"
        in (tree / "docs" / "compatibility.md").read_text()
    )
    done = matrix(tree, "--cores")
    assert done.returncode == 1 and done.stderr == (
        "launch/matrix.sh: --cores is no option; they are --keep and --core\n"
    )
