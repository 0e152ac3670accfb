"""One line of a log, decoded: fast where it is as JSONLSink writes it, leniently where it is nearly
so."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
from msgspec import Raw

ACTIONS = ("none", "skip", "lower_lr", "roll_back")
_MOST_STEPS = 1 << 53


class LogLine(msgspec.Struct, gc=False):
    """What the commands read of a step's line. Lists that are seldom looked at stay undecoded."""

    step: int
    total_norm: float | None
    norm_after: float | None = None
    clipped: bool = False
    skipped: bool = False
    nonfinite: int = 0
    coefs: list[float | None] = []
    threshold: list[float | None] = []
    cosine: list[float | None] = []
    clip_rate: float | None = None
    norm_type: float | None = 2.0
    groups: Raw = Raw(b"")
    group_norms: Raw = Raw(b"")
    layers: Raw = Raw(b"")
    layer_norms: Raw = Raw(b"")
    culprits: Raw = Raw(b"")
    notes: Raw = Raw(b"")
    rank_norms: Raw = Raw(b"")
    outlier_rank: int | None = None
    rank_deviation: float | None = None
    deviation: float | None = None
    action: str | None = None
    ended_in: str | None = None


_strict = msgspec.json.Decoder(LogLine)
_lenient = msgspec.json.Decoder(LogLine, strict=False)
_norms = msgspec.json.Decoder(list[float | None])
_anything = msgspec.json.Decoder()
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


def decode_line(text: bytes) -> LogLine | dict[str, Any] | None:
    """A step's line, a header as a dict, or None where it is neither."""
    try:
        line = _strict.decode(text)
    except (msgspec.DecodeError, *_UNREADABLE):
        line = _decode_leniently(text)
    if isinstance(line, LogLine) and not 0 <= line.step < _MOST_STEPS:
        return None
    return line


def _decode_leniently(text: bytes) -> LogLine | dict[str, Any] | None:
    """Also with NaN and Infinity, which JSON has not, and with characters that are no UTF-8."""
    try:
        record = json.loads(text.decode("utf-8", "replace"))
        if isinstance(record, dict) and "distclip_log" in record:
            return record
        clean = json.dumps(_without_nonfinite(record))  # lone surrogates become escapes
        return _lenient.decode(clean.encode())
    except (msgspec.DecodeError, *_UNREADABLE):
        return None


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _without_nonfinite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(v) for v in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_empty(raw: Raw) -> bool:
    """Whether a list is absent, null or without entries."""
    return bytes(raw).strip() in (b"", b"null", b"[]")


def decode_norms(raw: Raw) -> list[float]:
    """Norms, NaN where they are not finite; empty where they cannot be read."""
    try:
        values = _norms.decode(raw)
    except (msgspec.DecodeError, *_UNREADABLE):
        return []
    return [math.nan if value is None else value for value in values]


def decode_names(raw: Raw) -> tuple[str, ...]:
    """Printable names; empty where they cannot be read."""
    return tuple(printable_name(str(name)) for name in decode_list(raw))


def decode_list(raw: Raw) -> list[Any]:
    """Any list; empty where it cannot be read."""
    try:
        value = _anything.decode(raw) if not is_empty(raw) else []
    except (msgspec.DecodeError, *_UNREADABLE):
        return []
    return value if isinstance(value, list) else []


def printable_name(name: str) -> str:
    """A name from a log or a file system as it can be printed: one line, without control characters
    and lone surrogates."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in name)
