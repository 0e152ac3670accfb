"""The site is built with warnings as errors: no broken link, no page outside of the contents, and a
place in the reference for every public name."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

import distclip
from distclip.cli import COMMANDS

ROOT = Path(__file__).parents[2]
NEEDS = ("sphinx", "furo", "myst_parser", "sphinx_copybutton")
BESIDE = (  # public, and not in distclip.__all__
    "distclip.integrations.accelerate.prepare",
    "distclip.integrations.accelerate.release",
    "distclip.integrations.deepspeed.attach",
    "distclip.integrations.lightning.GradientClipping",
    "distclip.integrations.lightning.prepare",
    "distclip.integrations.transformers.clip_with_distclip",
    "distclip.testing.World",
    "distclip.testing.World.run",
    "distclip.testing.count_collectives",
    "distclip.testing.run_threads",
)


class Page(HTMLParser):
    """Its anchors, and its links to files."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if given.get("id"):
            self.ids.add(given["id"])
        target = given.get("href") if tag == "a" else given.get("src")
        if target and "://" not in target and not target.startswith(("data:", "mailto:")):
            self.links.append(target)


def build(source, target):
    command = ["-m", "sphinx", "-q", "-W", "--keep-going", "-E", "-b", "dirhtml", source, target]
    settings = {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=600, check=False,
        env=os.environ | settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for name in NEEDS:
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    target = tmp_path_factory.mktemp("site")
    done = build(str(ROOT / "docs"), str(target))
    assert done.returncode == 0, done.stderr[-5000:]
    return target


@pytest.fixture(scope="module")
def entries(site):
    """What the reference has: qualified name → page#anchor."""
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as file:
        objects = InventoryFile.load(file, "", lambda base, uri: uri)
    return {
        name: item.uri
        for kind, found in objects.items()
        if kind.startswith("py:")
        for name, item in found.items()
        if item.uri.endswith(f"#{name}")  # not where the code of it lies
    }


def test_every_public_name_has_a_place_in_the_reference(entries):
    names = [f"distclip.{name}" for name in distclip.__all__]
    names += [
        f"distclip.GradClipper.{name}" for name in vars(distclip.GradClipper) if name[0] != "_"
    ]
    lost = [name for name in (*names, *BESIDE) if name not in entries]
    assert lost == [], (
        "add a line such as `.. autoclass:: distclip.NAME` to a page of docs/reference"
    )
    assert all(entries[name].startswith("reference/") for name in names)


def test_nothing_else_is_said_to_be_public(entries):
    """No name of distclip's own top level that `__all__` lacks."""
    tops = {name.split(".")[1] for name in entries if name.startswith("distclip.")}
    assert tops - {*distclip.__all__, "integrations", "testing", "groups"} == set()


def test_the_table_of_public_names(site):
    text = (site / "reference" / "index.html").read_text()
    rows = re.findall(r"<tr class=\"row.*?</tr>", text, re.DOTALL)
    told = [re.sub(r"<[^>]+>", " ", row).split() for row in rows[1:]]
    assert sorted(row[0] for row in told) == sorted(distclip.__all__)
    assert {row[2] for row in told} == {"stable", "provisional"}


def test_commands_and_errors_have_their_anchors(site):
    assert {f"distclip-{name}" for name in COMMANDS} <= Page(
        site / "reference" / "cli" / "index.html"
    ).ids
    errors = [
        name for name in distclip.__all__ if name.endswith("Error") and name != "DistclipError"
    ]
    assert {name.lower() for name in errors} <= Page(site / "errors" / "index.html").ids


def test_no_link_is_broken(site):
    """Files and anchors, those too that Sphinx does not check."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 50, "vacuous"
    broken = []
    for path, page in pages.items():
        for link in page.links:
            name, _, anchor = link.partition("#")
            target = (path.parent / name.partition("?")[0]).resolve() if name else path
            target = target / "index.html" if target.is_dir() else target
            ids = pages[target].ids if target in pages else None
            if not target.exists() or (anchor and ids is not None and anchor not in ids):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


def test_what_the_site_needs_is_there_without_a_network(site):
    """Scripts, styles and fonts come with it; it can be searched."""
    for path in site.rglob("*.html"):
        assert (
            re.findall(r"<(?:script|link)[^>]+(?:src|href)=\"(?:https?:)?//", path.read_text())
            == []
        )
    assert (
        "GradClipper" in (site / "searchindex.js").read_text()
        or "gradclipper" in (site / "searchindex.js").read_text()
    )


def test_a_page_with_a_broken_link_fails_the_build(site, tmp_path):
    """The check can fail: a folder of the same settings, with one page."""
    for name in ("conf.py", "_ext", "_static"):
        (tmp_path / "docs").mkdir(exist_ok=True)
        (tmp_path / "docs" / name).symlink_to(ROOT / "docs" / name)
    page = tmp_path / "docs" / "index.md"
    page.write_text("# One\n\n[nowhere](nowhere.md)\n")
    done = build(str(tmp_path / "docs"), str(tmp_path / "out"))
    assert done.returncode != 0 and "nowhere.md" in done.stderr
