"""Fonts for names in figures, in any script, and names cut to a width."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from unicodedata import east_asian_width

from matplotlib.font_manager import fontManager, get_font

USUAL_FONT = "DejaVu Sans"  # comes with matplotlib
_BOX_FONT = "Last Resort"  # comes with matplotlib too; has a box for every character


def families_for(texts: Iterable[str]) -> tuple[list[str], str]:
    """Installed fonts that together have the characters of `texts`, the usual font first, and the
    characters that no font has."""
    lacking = {ord(c) for text in texts for c in text} - _font_characters(
        fontManager.findfont(USUAL_FONT)
    )
    families = [USUAL_FONT]
    for font in fontManager.ttflist if lacking else ():
        if not font.name.startswith(_BOX_FONT) and lacking & _font_characters(font.fname):
            families.append(font.name)
            lacking -= _font_characters(font.fname)
    return families, "".join(map(chr, sorted(lacking)))


@lru_cache(maxsize=64)
def _font_characters(path: str) -> frozenset[int]:
    try:
        return frozenset(get_font(path).get_charmap())
    except (OSError, RuntimeError):  # listed, but gone or broken
        return frozenset()


def shorten_name(name: str, most: int) -> str:
    """`name`, or its start and end where it takes more than `most` columns. CJK characters take
    two columns."""
    if sum(map(_column_width, name)) <= most:
        return name
    return f"{_fitting_start(name, most // 2 - 1)}…{_fitting_start(name[::-1], most // 2)[::-1]}"


def _fitting_start(name: str, most: int) -> str:
    taken = 0
    for i, character in enumerate(name):
        taken += _column_width(character)
        if taken > most:
            return name[:i]
    return name


def _column_width(character: str) -> int:
    return 2 if east_asian_width(character) in "WF" else 1
