"""The releases of torch that distclip's tests were run with: the pinned one, and those whose counts
`docs/compatibility.md` has.

`launch/matrix.sh` writes that page; a release is listed here together with its row on the page.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch

RUN = ("2.8.0", "2.9.1", "2.11.0", "2.13.0", "2.14.1", "2.15.0")


def untested_release_note(release: str) -> str:
    """A note about a release of torch if none of its series (2.13 for 2.13.1+cu130) was tested;
    else an empty text."""
    series = [_release_series(run) for run in RUN]
    if _release_series(release) in series:
        return ""
    return (
        f"distclip's tests were run with torch {', '.join(series)}, and not with {release}. It is "
        f"likely to work: `distclip doctor` checks "
        "it on this machine, launch/matrix.sh runs the tests"
    )


@lru_cache(maxsize=1)
def log_untested_release() -> None:
    """Log the note once in a process, by the logger `distclip`: a Python warning would end programs
    that turn warnings into errors."""
    said = untested_release_note(torch.__version__)
    if said:
        logging.getLogger("distclip").warning(said)


def is_before(*series: int) -> bool:
    """`is_before(2, 10)`: whether this torch is older than 2.10."""
    return tuple(map(int, _release_series(torch.__version__).split("."))) < series


def _release_series(release: str) -> str:
    return ".".join(release.partition("+")[0].split(".")[:2])
