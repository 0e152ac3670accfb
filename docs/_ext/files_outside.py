"""Links of a page to files of the repository that are no pages, and files that a page includes.

A page links them relative to itself, as a forge shows it. On the site they lead to the forge, where
pyproject.toml names one under `project.urls`; else the text stands as code.
"""

import os
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = re.compile(r"^```\{include\} (\S+)\n```$", re.M)
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]+)\]\((?P<path>[^)\s#:]+)(?P<anchor>#[^)]*)?\)")


def repository():
    """Its address, or an empty text."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r"^\s*(?:Repository|Source)\s*=\s*\"([^\"]+)\"", text, re.M | re.I)
    return found[1].rstrip("/") if found else ""


@cache
def shown_by():
    """Files outside of docs/ → the pages that include them."""
    pages = [page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts]
    found = {page: INCLUDE.findall(page.read_text()) for page in pages}
    return {(page.parent / name).resolve(): page for page, names in found.items() for name in names}


def rewritten(text, folder, page):
    """The text of a file in `folder`, as a part of `page`: its links to other files than pages
    replaced.

    Raises:
        ValueError: there is no such file.
    """

    def replace(found):
        target = (folder / found["path"]).resolve()
        target = shown_by().get(target, target)
        if found["image"]:
            link = os.path.relpath(target, page.parent)
            return f"![{found['text']}]({link})"
        if target.suffix == ".md" and target.is_relative_to(ROOT / "docs"):
            link = os.path.relpath(target, page.parent)  # a page: Sphinx checks it
            return f"[{found['text']}]({link}{found['anchor'] or ''})"
        if not target.exists():
            raise ValueError(f"{found[0]} leads to no file")
        name = found["text"]
        if base := repository():
            kind = "tree" if target.is_dir() else "blob"
            return f"[{name}]({base}/{kind}/main/{target.relative_to(ROOT)}{found['anchor'] or ''})"
        return name if name.startswith("`") else f"{name} (`{target.relative_to(ROOT)}`)"

    return LINK.sub(replace, text)


def on_source_read(app, docname, content):
    page = Path(app.env.doc2path(docname))
    if page.suffix != ".md":
        return

    def included(found):
        path = (page.parent / found[1]).resolve()
        app.env.note_dependency(path)
        return rewritten(path.read_text(), path.parent, page)

    content[0] = INCLUDE.sub(included, rewritten(content[0], page.parent, page))


def setup(app):
    app.connect("source-read", on_source_read)
    return {"parallel_read_safe": True}
