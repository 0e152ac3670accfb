"""What a caller passed, before it is used: a wrong type would fail later, by an error that does not
name the argument."""

from __future__ import annotations

import math
from typing import Any

from distclip.errors import ConfigError


def as_number(value: Any) -> float:
    """The value as a float; NaN, which no range admits, where it is no single number. A text is
    none."""
    if not hasattr(value, "__float__"):
        return math.nan
    try:
        return float(value)
    except Exception:  # several numbers, a complex one, one beyond float's range
        return math.nan


def as_list(value: Any) -> list[Any] | None:
    """What it holds, of whatever kind; None where it cannot be gone through. Its own errors while
    it is are left as they are."""
    try:
        items = iter(value)
    except TypeError:
        return None
    return list(items)


def check_flag(name: str, value: Any) -> None:
    """ConfigError for anything but True and False: what else counts as true is a guess."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is neither True nor False")


def is_text(value: Any, *allowed: str) -> bool:
    """Whether it is one of these texts: asked of anything, also of what compares in a way of its
    own, as arrays do."""
    return isinstance(value, str) and value in allowed
