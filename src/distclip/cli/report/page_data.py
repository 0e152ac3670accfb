"""The numbers that the page draws, packed small: columns as base64, constant ones as one number."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from distclip.cli.norm_history import NormHistory
from distclip.cli.part_shares import PartShares
from distclip.cli.report.thinning import kept_positions
from distclip.cli.run_log import RunLog

_POINT_BYTES = 1_000_000  # of all runs together, as base64
_BYTES_PER_POINT = 40
_FEWEST_POINTS = 400  # of a run
_HEAT_BYTES = 420_000  # of all heat maps together, as base64
_HEAT_ROWS = 24  # by mean, and as many by maximum
_LARGEST_FLOAT32, _SMALLEST_FLOAT32 = 3e38, 1e-37
_NOT_FINITE, _WHOLE = 255, 254  # codes of a share


def page_data(histories: Sequence[NormHistory]) -> dict[str, Any]:
    """What page.js reads. Names stand in it as text."""
    most = max(_FEWEST_POINTS, _POINT_BYTES // _BYTES_PER_POINT // len(histories))
    num_heats = sum(len(history.run.parts) for history in histories)
    return {
        "runs": [_run_data(history, most) for history in histories],
        "heats": [
            _heat_data(number, history.run, parts, _HEAT_BYTES // num_heats)
            for number, history in enumerate(histories)
            for parts in history.run.parts
        ],
    }


def _run_data(history: NormHistory, most: int) -> dict[str, Any]:
    run = history.run
    at = kept_positions(history, most)
    flags = run.clipped + 2 * run.skipped + 4 * ~run.finite
    # FixedValue's threshold bounds elements; several groups have norms of their own
    bounds_norm = not run.clamps and len(run.groups) <= 1
    data = {
        "name": run.name,
        "clamps": run.clamps,
        "p": f"{run.norm_type:g}",
        "steps": len(run),
        "kept": len(at),
        "step": _packed(run.step[at].astype(float), exact=True),
        "norm": _packed(run.norm[at]),
        "median": _packed(history.median[at]),
        "threshold": _packed(run.threshold[at]),
        "boundsNorm": bounds_norm,
        "coef": _packed(run.coef[at]),
        "rate": _packed(run.clip_rate[at]),
        "flags": _packed_bytes(flags[at]),
        "top": _packed(run.top[at].astype(float), exact=True),
        "share": _packed(np.where(np.isinf(run.top_share), 2.0, run.top_share)[at]),
        "parts": list(run.part_names) if (run.top[at] >= 0).any() else [],
    }
    if bool((run.cosine < 0.9999).any()):
        data["cosine"] = _packed(run.cosine[at])
    return data


def _heat_data(number: int, run: RunLog, parts: PartShares, most_bytes: int) -> dict[str, Any]:
    by_mean = np.argsort(-parts.mean, kind="stable")[:_HEAT_ROWS]
    by_largest = np.argsort(-parts.largest, kind="stable")[:_HEAT_ROWS]
    rows = np.union1d(by_mean, by_largest)
    columns = max(50, most_bytes * 3 // 4 // len(rows))
    first, last, shares = merged_columns(parts, rows, columns)
    codes = np.round(np.where(np.isfinite(shares), shares, 0) * _WHOLE)
    codes[np.isinf(shares)] = _NOT_FINITE
    labels, removed = short_labels([parts.names[i] for i in rows])
    where = {int(row): i for i, row in enumerate(rows)}
    left = np.setdiff1d(np.arange(len(parts.names)), by_mean)
    return {
        "run": number,
        "kind": parts.kind,
        "what": power_name(run.norm_type),
        "names": [parts.names[i] for i in rows],
        "labels": labels,
        "removed": removed,
        "total": len(parts.names),
        "byMean": [where[int(i)] for i in np.sort(by_mean)],
        "byLargest": [where[int(i)] for i in np.sort(by_largest)],
        "restOfMean": float(parts.mean[left].sum()),
        "first": _packed(first.astype(float), exact=True),
        "last": _packed(last.astype(float), exact=True),
        "shares": _packed_bytes(codes.T),  # row after row
    }


def merged_columns(parts: PartShares, rows: Any, most: int) -> tuple[Any, Any, Any]:
    """First and last steps and shares [columns, rows] of at most `most` columns: neighbouring
    entries merged by maximum."""
    num = len(parts.first)
    starts = np.arange(0, num, math.ceil(num / most))
    ends = np.append(starts[1:], num) - 1
    return parts.first[starts], parts.last[ends], np.fmax.reduceat(parts.shares[:, rows], starts)


def short_labels(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names without the dotted words that all of them begin or end with, and these: what was
    removed in front and behind."""
    words = [name.split(".") for name in names]
    room = min(map(len, words)) - 1  # one word of each name is kept
    head = next((i for i in range(room) if len({w[i] for w in words}) > 1), room)
    if any(w[head].isdecimal() for w in words):
        head = max(0, head - 1)  # a number alone is no name
    tail = next((i for i in range(room - head) if len({w[-1 - i] for w in words}) > 1), room - head)
    first, last = ".".join(words[0][:head]), ".".join(words[0][len(words[0]) - tail :])
    removed = [f"{first}."] * bool(first) + [f".{last}"] * bool(last)
    return [".".join(w[head : len(w) - tail]) for w in words], removed


def power_name(p: float) -> str:
    """What shares are shares of."""
    if p == 2:
        return "squared norm"
    return "norm to the power p" if math.isfinite(p) else "largest norm"


def _packed(values: Any, exact: bool = False) -> Any:
    """One number (null: not known) where all are equal, else base64 of float32, or of float64 where
    that is needed."""
    if not len(values) or np.isnan(values).all():
        return None
    if (values == values[0]).all():
        return float(values[0])
    size = np.abs(values[np.isfinite(values) & (values != 0)])
    wide = len(size) and (size.max() > _LARGEST_FLOAT32 or size.min() < _SMALLEST_FLOAT32)
    if exact:
        wide = bool((values.astype(np.float32) != values).any())
    kind = "f8" if wide else "f4"
    return {kind: base64.b64encode(values.astype(f"<{kind}").tobytes()).decode()}


def _packed_bytes(values: Any) -> Any:
    return {"u1": base64.b64encode(values.astype(np.uint8).tobytes()).decode()}
