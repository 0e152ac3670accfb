"""Fewer points for long runs: as many as a figure can resolve, spikes among them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from distclip.cli.run_log import RunLog

_MOST_POINTS = 3000  # drawn in a figure, shared by its runs


def stretches_for(runs: int, wide: bool) -> int:
    """Number of stretches of a line, each of which shows its lowest and its highest point."""
    return max(60, (_MOST_POINTS if wide else _MOST_POINTS // 3) // 2 // runs)


def known_points(run: RunLog, values: Any) -> tuple[Any, Any]:
    known = values.isfinite()
    return run.step[known].numpy(), values[known].numpy()


def thinned_points(x: Any, y: Any, stretches: int) -> tuple[Any, Any]:
    """The lowest and highest point of each stretch, and a gap where a value in it is not finite."""
    if len(x) <= 2 * stretches:
        return x, y
    kept: list[int] = []
    for a, b in pairwise(np.linspace(0, len(x), stretches + 1).astype(int)):
        known = np.isfinite(y[a:b])
        found = {a + int(np.argmin(known))} if not known.all() else set[int]()
        if known.any():
            found |= {a + int(np.nanargmin(y[a:b])), a + int(np.nanargmax(y[a:b]))}
        kept += sorted(found)
    return x[kept], y[kept]


def clipped_shares(run: RunLog, stretches: int) -> tuple[Any, Any]:
    """Steps, and the share of clipped ones in the stretch of each."""
    x, clipped = run.step.numpy(), run.clipped.double().numpy()
    if len(x) <= 2 * stretches:
        return x, clipped
    edges = np.linspace(0, len(x), stretches + 1).astype(int)
    return x[(edges[:-1] + edges[1:]) // 2], np.array(
        [clipped[a:b].mean() for a, b in pairwise(edges)]
    )


def spread_evenly(steps: Any, most: int) -> Any:
    """At most `most` of them, evenly spaced."""
    return steps if len(steps) <= most else steps[np.linspace(0, len(steps) - 1, most).astype(int)]
