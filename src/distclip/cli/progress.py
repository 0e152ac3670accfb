"""A bar on the terminal while large logs are read."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

_SHOWN_FROM_BYTES = 20_000_000
_WIDTH, _INTERVAL_S = 30, 0.1


class ProgressBar:
    """Counts bytes over all files; shown on a terminal alone, and where it takes a while. Its line
    is removed at the end."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._total = sum(file.stat().st_size for file in files if file.is_file())
        self._shows = self._total >= _SHOWN_FROM_BYTES and sys.stderr.isatty()
        self._done, self._shown_at = 0, 0.0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown_at:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        now = time.monotonic()
        if not self._shows or now - self._shown_at < _INTERVAL_S:
            return
        share = min(self._done / self._total, 1.0)
        bar = "█" * round(_WIDTH * share)
        text = f"\rreading {bar:░<{_WIDTH}} {share:4.0%} of {self._total / 1e6:.0f} MB"
        print(text, end="", file=sys.stderr, flush=True)
        self._shown_at = now
