"""Lists of numbers in short: 1, 2, 3, 6 as 1-3 and 6.

Apart from `exchange.channel.format_ranks`: the commands import public names of distclip alone.
"""

from __future__ import annotations

from collections.abc import Iterable


def number_ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers, in ascending order."""
    ranges: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = ranges[-1][0], number
        else:
            ranges.append((number, number))
    return ranges


def format_ranges(ranges: Iterable[tuple[int, int]], separator: str = ",") -> str:
    """[(0, 3), (6, 6)] → "0-3,6"."""
    return separator.join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
