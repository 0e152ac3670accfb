"""Every refusal. A message says who, what was seen, and what to do; a note under it says where
that is explained."""

from __future__ import annotations

from functools import lru_cache
from importlib import metadata

_SHORT = 160  # letters of a text that every rank prints


class DistclipError(Exception):
    """Base of all errors that distclip raises by itself.

    Where several ranks raise the same one together, `str` is the whole text on one of them and a
    line on the others, which says on which rank it stands; `text` is the whole one everywhere.

    Attributes:
        full_text_on: the global rank whose `str` is the whole text; None where each rank's is.
        is_told_elsewhere: whether that is another rank than this one.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.full_text_on: int | None = None
        self.is_told_elsewhere = False
        # what Python 3.11 and later print under a traceback
        self.__notes__ = [f"what to do: {self.page}"]

    @property
    def text(self) -> str:
        """What is wrong and what to do: the same on every rank that raises this error."""
        return super().__str__()

    @property
    def page(self) -> str:
        """Where errors of this class are explained: a link, or a place in the project's folder
        where its metadata name no site."""
        return f"{docs_place('errors')}#{type(self).__name__.lower()}"

    def told_on(self, rank: int, here: int) -> None:
        """Leave the whole text to one of the ranks that raise this error.

        Args:
            rank: the global rank that tells it.
            here: this one.
        """
        self.full_text_on, self.is_told_elsewhere = rank, rank != here
        if self.is_told_elsewhere:
            self.__notes__.clear()

    def __str__(self) -> str:
        text = self.text
        if not self.is_told_elsewhere or ("\n" not in text and len(text) <= _SHORT):
            return text
        begin = text.partition("\n")[0]
        if len(begin) > _SHORT:
            begin = (begin[:_SHORT].rpartition(" ")[0] or begin[:_SHORT]) + " …"
        return f"{begin} [the whole text: rank {self.full_text_on}]"


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
