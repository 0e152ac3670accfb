"""The map of the package, the records of decisions and CONTRIBUTING.md name only what is there, and
stay short; so do the lists of checks beside them."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml

from parity.layouts import LAYOUTS

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "distclip"
DESIGN = ROOT / "docs" / "design"
MAP = SOURCE / "README.md"
PAGES = [MAP, ROOT / "CONTRIBUTING.md", *sorted(DESIGN.glob("*.md"))]
FAST = [
    line
    for line in (ROOT / "tests" / "fast.txt").read_text().splitlines()
    if line.startswith("tests/")
]
WORDS = set(re.findall(r"\w+", " ".join(p.read_text() for p in SOURCE.rglob("*.py"))))


def relative(page):
    return str(page.relative_to(ROOT))


@cache
def functions_of(path):
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def quoted(text):
    """What stands in backticks, outside of code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def lost_paths(text):
    """Files and folders that are neither below the package nor below the root."""
    paths = {
        match
        for code in quoted(text)
        for match in re.findall(r"(?<![\w.*-])(?:[\w.]+/)+[\w.]*|(?<![\w./-])\w+\.(?:py|c)\b", code)
    }
    return sorted(p for p in paths if not ((SOURCE / p).exists() or (ROOT / p).exists()))


def lost_tests(text):
    """Ids of tests that are not in the file named, and names of tests that are nowhere."""
    ids = re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", text)
    everywhere = set().union(*map(functions_of, (ROOT / "tests").rglob("test_*.py")))
    named = set(re.findall(r"(?<![\w/])(test_\w+)(?!\w|\.py)", text))
    return [f"{path}::{name}" for path, name in ids if name not in functions_of(ROOT / path)] + [
        name for name in sorted(named) if name not in everywhere
    ]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert lost_paths(text) == []
    assert lost_tests(text) == []


def test_names_on_the_map_are_those_of_the_code():
    codes = [code for code in quoted(MAP.read_text()) if re.fullmatch(r"[\w.]+(\(\w*\))?", code)]
    names = {name for code in codes for name in re.findall(r"[A-Za-z_]\w+", code)}
    assert len(names) > 60, "vacuous"
    files = {part for path in SOURCE.rglob("*") for part in path.relative_to(SOURCE).parts}
    known = WORDS | {name.partition(".")[0] for name in files} | {"ROOMS", "pyproject", "toml"}
    assert sorted(names - known) == []


def test_the_checks_can_fail():
    assert lost_paths("`setup/plan.py`, `plan.py`, `setup/`, `no/such.py`") == [
        "no/such.py",
        "plan.py",
    ]
    assert lost_tests("`tests/test_import.py::test_no_such`, `test_nor_this`") == [
        "tests/test_import.py::test_no_such",
        "test_no_such",
        "test_nor_this",
    ]


def test_lengths():
    assert len(MAP.read_text().splitlines()) <= 100
    long = [page.name for page in DESIGN.glob("*.md") if len(page.read_text().splitlines()) > 60]
    assert long == []


def test_every_folder_is_on_the_map_and_every_decision_in_the_index():
    folders = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert [folder for folder in sorted(folders) if f"`{folder}/`" not in MAP.read_text()] == []
    linked = re.findall(r"\]\((\w+\.md)\)", (DESIGN / "README.md").read_text())
    assert sorted(linked) == sorted({p.name for p in DESIGN.glob("*.md")} - {"README.md"})


def test_the_fast_selection_exists():
    assert len(FAST) == len(set(FAST)) > 10
    for entry in FAST:
        path, *names = entry.split("::")
        assert (ROOT / path).is_file(), entry
        for name in names:
            test, _, case = name.partition("[")
            assert test in functions_of(ROOT / path), entry
            assert not case or case.removesuffix("]") in LAYOUTS, entry


def test_hooks_before_a_commit_are_the_checks_of_the_script():
    script = (ROOT / "launch" / "test.sh").read_text()
    checks = [shlex.split(line) for line in re.findall(r"^run (?!pytest)(.*)$", script, re.M)]
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local" and {hook["language"] for hook in repo["hooks"]} == {"system"}
    entries = [hook["entry"].removeprefix(".venv/bin/") for hook in repo["hooks"]]
    python = " --pythonpath .venv/bin/python"  # in the script PATH says so
    assert [shlex.split(entry.removesuffix(python)) for entry in entries] == checks
