"""Names in figures: any script, any length."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from unicodedata import east_asian_width

from matplotlib.font_manager import fontManager, get_font

USUAL = "DejaVu Sans"  # comes with matplotlib
_BOXES = "Last Resort"  # too, and has a box for every character


def families_for(texts: Iterable[str]) -> tuple[list[str], str]:
    """Installed fonts that together have the characters of `texts`, the usual one first; and the
    characters that none has."""
    lacking = {ord(c) for text in texts for c in text} - _characters(fontManager.findfont(USUAL))
    families = [USUAL]
    for font in fontManager.ttflist if lacking else ():
        if not font.name.startswith(_BOXES) and lacking & _characters(font.fname):
            families.append(font.name)
            lacking -= _characters(font.fname)
    return families, "".join(map(chr, sorted(lacking)))


@lru_cache(maxsize=64)
def _characters(path: str) -> frozenset[int]:
    try:
        return frozenset(get_font(path).get_charmap())
    except (OSError, RuntimeError):  # listed, but gone or broken
        return frozenset()


def shortened(name: str, most: int) -> str:
    """Start and end of a name that takes more than `most` columns; CJK characters take two."""
    if sum(map(_columns, name)) <= most:
        return name
    return f"{_within(name, most // 2 - 1)}…{_within(name[::-1], most // 2)[::-1]}"


def _within(name: str, most: int) -> str:
    taken = 0
    for i, character in enumerate(name):
        taken += _columns(character)
        if taken > most:
            return name[:i]
    return name


def _columns(character: str) -> int:
    return 2 if east_asian_width(character) in "WF" else 1
