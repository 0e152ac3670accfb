"""Fewer points for long runs: as many as a page has room for, every spike among them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from distclip.cli.norm_history import NormHistory

_NOTABLE_SHARE = 0.4  # of the points: steps that are kept whatever lies beside them
_CLOSE_RATIO = 1.5  # times the running median: from here on a step is a candidate for them


def kept_positions(history: NormHistory, most: int) -> Any:
    """[at most about `most`] positions in ascending order: all, or the lowest and the highest norm
    of each of equal stretches, and what no stretch may hide: spikes, skipped steps, actions, ranks
    that stand out."""
    run, steps = history.run, len(history.run)
    if steps <= most:
        return np.arange(steps)
    kept = np.zeros(steps, bool)
    kept[[0, -1]] = True
    kept[_notable_positions(history, int(most * _NOTABLE_SHARE))] = True
    num = max(1, (most - int(kept.sum())) // 2)
    kept[extreme_positions(run.norm, num)] = True
    return np.flatnonzero(kept)


def extreme_positions(values: Any, stretches: int) -> Any:
    """The lowest and highest finite value of each stretch of equal length. A stretch without any
    gives its first position."""
    length = math.ceil(len(values) / stretches)
    rows = math.ceil(len(values) / length)
    padded = np.full(rows * length, np.nan)
    padded[: len(values)] = values
    table = padded.reshape(rows, length)
    start = np.arange(rows) * length
    bad = np.isnan(table)
    low = np.where(bad, np.inf, table).argmin(1)
    high = np.where(bad, -np.inf, table).argmax(1)
    return np.unique(np.concatenate([start + low, start + high]))


def _notable_positions(history: NormHistory, most: int) -> Any:
    """Spikes first, then starts and ends of stretches of skipped steps and the like, then the rest
    of what lies far above the running median."""
    run = history.run
    marked = (run.skipped | ~run.finite | (run.action > 0) | (run.outlier_rank >= 0)).astype(
        np.int8
    )
    edges = np.flatnonzero(np.diff(marked, prepend=0, append=0))
    edges = np.unique(np.concatenate([edges[edges < len(run)], edges[edges > 0] - 1]))
    spikes = history.spikes[np.argsort(-history.ratio[history.spikes])]
    far = np.flatnonzero(history.ratio > _CLOSE_RATIO)
    far = far[np.argsort(-history.ratio[far])][: most // 4]
    return np.concatenate([spikes[: most // 2], edges[: most // 4], far])
