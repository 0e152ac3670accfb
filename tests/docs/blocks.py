"""The code blocks of a page, so that what it shows is what runs."""

import re
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).resolve().parents[2] / "docs"
FENCED = re.compile(
    r"(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    where: str  # page:line
    # "before", "runs: FIXTURE" or "runs in a framework: FIXTURE"; empty where there is none
    mark: str
    code: str

    @property
    def fixture(self):
        return self.mark.partition(": ")[2]

    def run(self, names):
        """Execute it among `names`, which keep what it assigns."""
        exec(compile(self.code, self.where, "exec"), names)
        return names


def blocks(page):
    text = (DOCS / page).read_text()
    return [
        Block(
            f"docs/{page}:{text[: found.start('code')].count(chr(10)) + 1}",
            found["mark"] or "",
            found["code"],
        )
        for found in FENCED.finditer(text)
        if found["language"] == "python"
    ]


def marked(page, kind):
    return [block for block in blocks(page) if block.mark.startswith(kind)]
