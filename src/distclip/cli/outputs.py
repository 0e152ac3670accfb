"""Files that a command writes: a log is never overwritten, and a file is written whole or not at
all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path


class OutputError(Exception):
    """A file that must not be written. The text says what to do."""


def check_page(page: Path) -> None:
    """OutputError where `page` is not the name of an HTML file, or exists and is no HTML file."""
    if page.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"--output {page}: the page is HTML; name a file that ends in .html")
    if page.is_dir():
        raise OutputError(
            f"--output {page} is a folder; name a file in it, such as {page / 'report.html'}"
        )
    if page.exists():
        with page.open("rb") as file:
            start = file.read(512).lstrip()
        if start and not start.startswith(b"<"):
            raise OutputError(
                f"--output {page} is there and is no HTML page; it stays as it is, "
                f"name another file"
            )


def check_pictures(pictures: Iterable[Path]) -> None:
    """OutputError where one exists and is no PNG."""
    for picture in pictures:
        if picture.exists() and picture.read_bytes()[:8] not in (b"", b"\x89PNG\r\n\x1a\n"):
            raise OutputError(
                f"{picture} is there and is no PNG; it stays as it is, name another folder"
            )


def check_not_read(outputs: Iterable[Path], logs: Iterable[Path]) -> None:
    """OutputError where an output is one of the logs, by whatever name or link."""
    read = [log for log in logs if log.exists()]
    for output in outputs:
        if output.exists() and any(output.samefile(log) for log in read):
            raise OutputError(
                f"{output} is a log that is read here, and a log is never overwritten; name "
                "another output"
            )


def write_all(files: Mapping[Path, bytes]) -> None:
    """Write all of them, or none: each under a temporary name beside its target, and then renamed,
    so that a full disk leaves the earlier files.

    Raises:
        OSError: one could not be written.
    """
    with ExitStack() as cleanup:
        temporary: list[tuple[Path, Path]] = []
        for path, content in files.items():
            target = path.resolve()  # what a link points to, so that it stays a link
            target.parent.mkdir(parents=True, exist_ok=True)
            new = target.with_name(f".distclip-{os.getpid()}-{len(temporary)}.part")
            cleanup.callback(new.unlink, missing_ok=True)
            new.write_bytes(content)
            temporary.append((new, target))
        for new, target in temporary:
            new.replace(target)
