"""What this rank's steps were about, in the user's own words: kept here, and sent only for a step
that matters."""

from __future__ import annotations

import json
from collections import deque
from contextlib import suppress
from typing import Any

import torch

from distclip.exchange.channel import Channel
from distclip.records import Note

KEPT = 3  # steps: what shows in a gradient may have been caused by the step before
MOST_BYTES = 4096  # of JSON, in all that one rank sends


class NoteBook:
    """This rank's notes of the last steps that were not sent."""

    def __init__(self) -> None:
        self.kept: deque[tuple[int, str]] = deque(maxlen=KEPT)  # step, JSON in ASCII

    def keep(self, step: int, text: str) -> None:
        self.kept.append((step, text[: MOST_BYTES + 1]))

    def has_some(self, step: int) -> bool:
        """Whether there are notes of the last steps. Older ones go, and so do those of steps to
        come: a checkpoint was loaded, and they will be other steps."""
        kept = self.kept
        while kept and not step - KEPT < kept[0][0] <= step:
            kept.popleft()
        return bool(kept)

    def gather(self, channel: Channel, device: torch.device) -> tuple[Note, ...]:
        """A collective, of two all-reduces: all ranks' notes, by rank and step. They are not kept
        any longer.

        The latest of a rank come whole as long as there is room; one for which there is too little
        is cut, and what is older is left out.
        """
        lines: list[str] = []
        left = MOST_BYTES
        for step, text in reversed(self.kept):
            if left > 0:
                lines.append(f"{step}\t{int(len(text) > left)}\t{text[:left]}")
                left -= len(text)
        self.kept.clear()
        notes: list[Note] = []
        texts = channel.gather_texts("\n".join(reversed(lines)), device, "the exchange of notes")
        for rank, said in zip(channel.ranks, texts, strict=True):
            for line in said.splitlines():
                step, cut, text = line.split("\t")
                notes.append(_note_of(rank, int(step), text, is_cut=cut == "1"))
        return tuple(notes)


def _note_of(rank: int, step: int, text: str, is_cut: bool) -> Note:
    note: Any = text
    if not is_cut:
        # one that is nested nearly as deep as Python goes stays a text
        with suppress(RecursionError):
            note = json.loads(text)
    return Note(rank, step, note, is_cut)
