"""Every refusal. A message says who, what was seen, and what to do; a note under it says where
that is explained."""

from __future__ import annotations

import sys
from functools import lru_cache, partial
from importlib import metadata
from typing import Any

_SHORT = 160  # letters of a text that every rank prints whole


class DistclipError(Exception):
    """Base of all errors that distclip raises by itself.

    Where several ranks raise one together, `str` is the same text on all of them. If nobody catches
    it, one rank prints it whole and the others a line, which says where the whole text stands.

    Attributes:
        full_text_on: the global rank that prints the whole text; None where each rank prints its
            own.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.full_text_on: int | None = None
        self._is_told_elsewhere = False
        # what Python 3.11 and later print under a traceback
        self.__notes__ = [f"what to do: {self.page}"]

    @property
    def page(self) -> str:
        """Where errors of this class are explained: a link, or a place in the project's folder
        where its metadata name no site."""
        return f"{docs_place('errors')}#{type(self).__name__.lower()}"

    @property
    def brief(self) -> str:
        """The line that this rank prints in place of the whole text, if another rank prints that;
        else the text."""
        text = str(self)
        if not self._is_told_elsewhere or ("\n" not in text and len(text) <= _SHORT):
            return text
        begin = text.partition("\n")[0]
        if len(begin) > _SHORT:
            begin = (begin[:_SHORT].rpartition(" ")[0] or begin[:_SHORT]) + " …"
        return f"{begin} [the whole text: rank {self.full_text_on}]"

    def told_on(self, rank: int, here: int) -> None:
        """Leave the whole text to one of the ranks that raise this error.

        Args:
            rank: the global rank that prints it.
            here: this one.
        """
        self.full_text_on, self._is_told_elsewhere = rank, rank != here
        # another hook than Python's own, or that of torch's process groups, which sets the rank
        # before each line of it, knows best what to do with errors
        hook: Any = sys.excepthook
        known = hook is sys.__excepthook__ or str(hook.__module__).startswith("torch.distributed")
        if self._is_told_elsewhere and known:
            sys.excepthook = partial(_print_briefly, hook)


def _print_briefly(
    before: Any, kind: type[BaseException], error: BaseException, trace: Any
) -> None:
    """What was done before with an error that nobody caught, but a line alone for one that another
    rank prints whole, with its traceback."""
    if isinstance(error, DistclipError) and error.brief != str(error):
        print(f"{kind.__module__}.{kind.__qualname__}: {error.brief}", file=sys.stderr)
    else:
        before(kind, error, trace)


class ConfigError(DistclipError, ValueError):
    """An argument that cannot be honoured."""


class PlacementError(DistclipError, ValueError):
    """A parameter of which distclip cannot tell what part this rank holds."""


class GradientError(DistclipError, RuntimeError):
    """A gradient that does not fit the plan: unreduced, unsharded, missing everywhere, or of a
    replaced parameter."""


class AgreementError(DistclipError, RuntimeError):
    """Ranks that should hold, run or decide the same do not."""


class NonFiniteError(DistclipError, RuntimeError):
    """Gradients hold inf or NaN, and the caller asked for an error."""


class ExchangeError(DistclipError, RuntimeError):
    """A collective failed or timed out: a rank was lost, is stuck, or never called."""


@lru_cache(maxsize=8)
def docs_place(page: str) -> str:
    """Where a page of the documentation is: on the site that the installed package's metadata name
    as its Documentation, else in the project's folder."""
    try:
        urls = metadata.metadata("distclip").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        urls = []
    for label, _, url in (entry.partition(", ") for entry in urls):
        if label == "Documentation":
            return f"{url.rstrip('/')}/{page}/"
    return f"docs/{page}.md"
