"""The README and the pages claim what tests show: the table of layouts is that of the parity tests,
figures are those of the benchmarks, and all that is linked or named is there."""

import ast
import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from docs import speed
from parity.layouts import LAYOUTS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# pages that hold what tests show
PAGES = ("README.md", "docs/layouts.md", "docs/guarantees.md", "docs/limits.md", "docs/reports.md")
TESTS = {
    node.name
    for path in (ROOT / "tests").rglob("test_*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef)
}


def table(text):
    """The cells of the first table's rows."""
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def section(heading):
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_every_layout_is_in_the_table_and_the_table_names_no_other():
    cells = [row[-1] for row in table((ROOT / "docs" / "layouts.md").read_text())]
    patterns = [name for cell in cells for name in re.findall("`([^`]+)`", cell)]
    assert [name for name in LAYOUTS if not any(fnmatchcase(name, p) for p in patterns)] == []
    assert [
        p for p in patterns if not any(fnmatchcase(name, p) for name in {*LAYOUTS, *TESTS})
    ] == []


def test_all_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_all_named_tests_and_files_exist(page):
    text = (ROOT / page).read_text()
    assert set(re.findall(r"`(test_\w+)`", text)) - TESTS == set()
    paths = set(re.findall(r"(?<![\w/])((?:launch|configs|tests|docs|src)/[\w./]+\w)", text))
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    assert paths or page != "README.md"


def test_figures_of_speed_are_those_of_the_benchmarks():
    text = section("Speed")
    told = re.findall(r"(?<![\w.])\d+\.\d\d(?!\d)", text)
    assert len(told) >= 8
    pages = [
        json.loads((ROOT / "benchmarks" / f"{n}.json").read_text())
        for n in ("results", "results_gpu")
    ]
    medians = {
        f"{row['value']['median']:.2f}"
        for page in pages
        for row in page["rows"]
        if row["unit"] == "x"
    }
    assert [figure for figure in told if figure not in medians] == []
    fast = {line.name: line for line in speed.lines() if line.page == "results"}
    for name in ("GPT-2, fp32", "FSDP2, 1,000 tensors, 4 ranks"):
        assert {f"{fast[name].idle:.2f}", f"{fast[name].active:.2f}"} <= set(told), name
    assert f"{fast['DDP, 10 tensors, 4 ranks'].idle:.2f}" in told, "what is slower is told"


def test_the_chart_shows_slower_cases_too():
    lines = speed.lines()
    assert len(lines) > 10
    assert sum(line.idle < 1 for line in lines) >= 4


def test_its_length_and_its_first_screen():
    assert len(README.split()) <= 1200
    first = "\n".join(README.splitlines()[:30])
    assert all(text in first for text in ("launch/demo.sh", "launch/test.sh", "pip install"))
    assert [line[:60] for line in README.splitlines() if len(line) > 140 and "|" not in line] == [
        line[:60] for line in README.splitlines() if line.startswith("**Status**")
    ]
