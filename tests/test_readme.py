"""The README claims what tests show: its table of layouts is that of the parity tests, and all it
links or names is there."""

import ast
import re
from fnmatch import fnmatchcase
from pathlib import Path

from parity.layouts import LAYOUTS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TESTS = {
    node.name
    for path in (ROOT / "tests").rglob("test_*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef)
}


def table(heading):
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|")][2:]


def test_every_layout_is_in_the_table_and_the_table_names_no_other():
    cells = [line.strip("|").split("|")[-1] for line in table("Layouts")]
    patterns = [name for cell in cells for name in re.findall("`([^`]+)`", cell)]
    assert [name for name in LAYOUTS if not any(fnmatchcase(name, p) for p in patterns)] == []
    assert [
        p for p in patterns if not any(fnmatchcase(name, p) for name in {*LAYOUTS, *TESTS})
    ] == []


def test_all_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_all_named_tests_and_files_exist():
    names = set(re.findall(r"`(test_\w+)`", README))
    assert names - TESTS == set() != names
    paths = set(re.findall(r"((?:launch|configs|tests|docs|src)/[\w./]+\w)", README))
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_its_length():
    assert 150 <= len(README.splitlines()) <= 365
