"""Shares of groups or layers in the norm, over the steps, in bounded memory: neighbouring steps are
merged by maximum, so that a part which dominates one step alone stays visible."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np

from distclip.cli.log_lines import LogLine, decode_names, decode_norms, is_empty

_MOST_NUMBERS = 4_000_000  # shares kept of one kind
_PENDING_NUMBERS = 65_536  # norms collected before their shares are worked out


@dataclass(frozen=True)
class PartShares:
    """Shares of the power sum (with p = inf: of the largest norm) at those steps at which norms
    were written.

    An entry covers one step, or several merged by maximum. inf marks a part whose norm was not
    finite; the other parts of such a step are NaN.
    """

    kind: str  # "group" or "layer"
    names: tuple[str, ...]
    first: Any  # [entries] int64
    last: Any  # [entries] int64: steps that the entry covers
    shares: Any  # [entries, names] float32: between 0 and 1, inf or NaN
    mean: Any  # [names] float64: over all finite steps
    largest: Any  # [names] float64: over all steps; inf where it was not finite at one


def power_shares(norms: Any, p: float) -> Any:
    """[steps, names] float64 norms → shares as in PartShares."""
    bad = ~np.isfinite(norms)
    largest = np.where(bad, 0, norms).max(1, keepdims=True, initial=0)
    # powers of what is at most 1 do not overflow
    scaled = norms / np.where(largest > 0, largest, 1)
    if not math.isinf(p):
        scaled = scaled**p
        total = scaled.sum(1, keepdims=True)
        scaled = scaled / np.where(total > 0, total, 1)
    return np.where(bad.any(1, keepdims=True), np.where(bad, np.inf, np.nan), scaled)


class ShareCollector:
    """Takes the lines of a file in their order."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.all_names: list[str] = []  # also those of before the clipper was rebuilt
        self._raw_names, self._names, self._p = b"", (), 2.0
        self._norms, self._steps, self._rows = array("d"), array("q"), array("q")
        # rows of lines, the part with the largest share in each, that share
        self._tops: list[tuple[Any, Any, Any]] = []
        self._start_over()

    def add(self, row: int, line: LogLine) -> None:
        """`row`: of this line among all."""
        names, norms = (
            (line.groups, line.group_norms)
            if self.kind == "group"
            else (line.layers, line.layer_norms)
        )
        if is_empty(norms):
            return
        p = math.inf if line.norm_type is None else line.norm_type
        if bytes(names) != self._raw_names or p != self._p:
            self._flush()
            self._raw_names, self._p = bytes(names), p
            new = decode_names(names)
            if new != self._names:  # the clipper was rebuilt: keep the latest parts
                self._names = new
                self._start_over()
        if len(self._names) < 2:
            return
        values = decode_norms(norms)
        if len(values) != len(self._names):
            return
        self._norms.extend(values)
        self._steps.append(line.step)
        self._rows.append(row)
        if len(self._norms) >= _PENDING_NUMBERS:
            self._flush()

    def finish(self) -> PartShares | None:
        """None where there were never two parts."""
        self._flush()
        if not self._filled:
            return None
        return PartShares(
            kind=self.kind,
            names=self._names,
            first=self._first[: self._filled].copy(),
            last=self._last[: self._filled].copy(),
            shares=self._shares[: self._filled].copy(),
            mean=self._sum / max(self._num_finite, 1),
            largest=self._largest,
        )

    def put_tops(self, index: Any, share: Any, offset: int) -> None:
        """Write the largest part of each line, `offset` added to its number in `all_names`, and its
        share."""
        for rows, tops, shares in self._tops:
            index[rows], share[rows] = tops + offset, shares

    def _start_over(self) -> None:
        width = len(self._names)
        self._offset = len(self.all_names)
        self.all_names += self._names
        capacity = max(64, _MOST_NUMBERS // max(width, 1))
        self._capacity = capacity - capacity % 2
        self._shares = np.empty((0, width), np.float32)
        self._first, self._last = np.empty(0, np.int64), np.empty(0, np.int64)
        self._filled, self._per_entry, self._in_last = 0, 1, 1
        self._sum, self._largest = np.zeros(width), np.zeros(width)
        self._num_finite = 0

    def _flush(self) -> None:
        if not self._steps:
            return
        norms = np.array(self._norms).reshape(len(self._steps), -1)
        steps, rows = np.array(self._steps), np.array(self._rows)
        self._norms, self._steps, self._rows = array("d"), array("q"), array("q")
        shares = power_shares(norms, self._p)
        tops = np.argmax(np.where(np.isnan(shares), -1, shares), 1)
        self._tops.append(
            (rows, (tops + self._offset).astype(np.int32), shares[np.arange(len(tops)), tops])
        )
        finite = np.isfinite(shares).all(1)
        self._sum += shares[finite].sum(0)
        self._num_finite += int(finite.sum())
        self._largest = np.fmax(self._largest, np.fmax.reduce(shares, 0))
        for step, one in zip(steps.tolist(), shares.astype(np.float32)):
            self._add_entry(step, one)

    def _add_entry(self, step: int, shares: Any) -> None:
        while self._filled and self._first[self._filled - 1] >= step:
            # a run that was resumed: the later line counts
            self._filled, self._in_last = self._filled - 1, self._per_entry
        if self._filled and self._in_last < self._per_entry:
            at = self._filled - 1
            np.fmax(self._shares[at], shares, out=self._shares[at])
            self._last[at] = step
            self._in_last += 1
            return
        if self._filled == self._capacity:
            self._merge_pairs()
            self._add_entry(step, shares)
            return
        if self._filled == len(self._first):
            self._grow()
        self._shares[self._filled] = shares
        self._first[self._filled] = self._last[self._filled] = step
        self._filled, self._in_last = self._filled + 1, 1

    def _merge_pairs(self) -> None:
        half = self._filled // 2
        pairs = self._shares[: 2 * half].reshape(half, 2, -1)
        self._shares[:half] = np.fmax(pairs[:, 0], pairs[:, 1])
        self._first[:half] = self._first[: 2 * half : 2]
        self._last[:half] = self._last[1 : 2 * half : 2]
        self._filled, self._per_entry = half, 2 * self._per_entry
        self._in_last = self._per_entry

    def _grow(self) -> None:
        room = min(self._capacity, max(64, 2 * self._filled))
        self._shares = np.resize(self._shares, (room, self._shares.shape[1]))
        self._first, self._last = np.resize(self._first, room), np.resize(self._last, room)
