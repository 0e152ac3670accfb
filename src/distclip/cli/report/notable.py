"""The steps that a reader should look at: the largest, those where a rank stands out, those that
were skipped; and what is known of each."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from distclip.cli.norm_history import NormHistory
from distclip.cli.run_log import ACTIONS, RankNote, RunLog
from distclip.cli.suggest.advice import percent, times

_MOST_OF_A_KIND = 10
_MOST_OF_A_RANK = 3
_LONGEST_NOTE, _MOST_NOTES = 160, 12  # characters and notes shown
_DONE = {
    "lower_lr": "asked to lower the learning rate",
    "roll_back": "asked to roll back",
    "skip": "asked to skip",
}


@dataclass(frozen=True)
class NotableStep:
    """A row of a table, in words; empty texts: not known."""

    step: int
    norm: float  # NaN: not finite
    ratio: float  # norm over the running median; NaN: not known
    layer: str  # the layer or group with the largest share, and the share
    rank: str
    culprits: tuple[str, ...]
    notes: tuple[str, ...]
    done: str


def largest_steps(history: NormHistory) -> list[NotableStep]:
    """The largest by norm and by the running median, the first of each streak in which an action
    was asked for, and those of a rank that lies off; the largest norm first."""
    run = history.run
    norm = np.where(run.finite, run.norm, -np.inf)
    ratio = np.where(np.isfinite(history.ratio), history.ratio, -np.inf)
    chosen = set(_top(norm)) | set(_top(np.where(ratio > 1, ratio, -np.inf)))
    asked = np.flatnonzero(np.diff((run.action > 0).astype(np.int8), prepend=0) > 0)
    chosen |= set(asked[:_MOST_OF_A_KIND].tolist())
    if (faulty := history.faulty_rank) is not None:
        own = np.where(run.outlier_rank == faulty.rank, run.rank_deviation, np.nan)
        chosen |= {faulty.at, *_top(np.where(np.isnan(own), -np.inf, own))[:_MOST_OF_A_RANK]}
    return [notable_step(history, at) for at in sorted(chosen, key=lambda at: (-norm[at], at))]


def skipped_steps(history: NormHistory, most: int) -> tuple[list[NotableStep], int]:
    """The first ones, and how many there are."""
    at = np.flatnonzero(history.run.skipped)
    return [notable_step(history, int(i)) for i in at[:most]], len(at)


def notable_step(history: NormHistory, at: int) -> NotableStep:
    """What is known of the step at a position."""
    run, details = history.run, history.run.details_of(at)
    rank, notes = int(run.outlier_rank[at]), details.notes
    concerned = {culprit.rank for culprit in details.culprits} | {rank}
    step = int(run.step[at])

    def order(note: RankNote) -> tuple[bool, bool, int, int]:
        """This step's notes first, the concerned ranks' before the others'."""
        earlier = 0 if note.step is None else step - note.step
        return earlier != 0, note.rank not in concerned, earlier, note.rank

    notes = sorted(notes, key=order)
    texts = [_note_text(note, step) for note in notes[:_MOST_NOTES]]
    if len(notes) > _MOST_NOTES:
        texts.append(f"and {len(notes) - _MOST_NOTES:,} more in the log")
    return NotableStep(
        step=step,
        norm=float(run.norm[at]),
        ratio=float(history.ratio[at]),
        layer=top_part(run, at),
        rank=_rank_text(run, at),
        culprits=tuple(map(str, details.culprits)),
        notes=tuple(texts),
        done=_what_was_done(run, at),
    )


def top_part(run: RunLog, at: int) -> str:
    """ "layers.3: 97 %", or an empty text."""
    top, share = int(run.top[at]), float(run.top_share[at])
    if top < 0:
        return ""
    return f"{run.part_names[top]}: {'not finite' if math.isinf(share) else percent(share)}"


def _top(values: Any) -> list[int]:
    finite = int(np.isfinite(values).sum())
    num = min(_MOST_OF_A_KIND, finite)
    return np.argpartition(-values, num - 1)[:num].tolist() if num else []


def _rank_text(run: RunLog, at: int) -> str:
    rank, deviation = int(run.outlier_rank[at]), float(run.rank_deviation[at])
    if rank < 0:
        return ""
    norms = run.details_of(at).rank_norms
    own = f", norm {norms[rank]:.4g}" if rank < len(norms) else ""
    return f"{rank}{own}" + ("" if math.isnan(deviation) else f", {times(deviation)} deviations")


def _note_text(note: RankNote, step: int) -> str:
    text = note.note if isinstance(note.note, str) else json.dumps(note.note, ensure_ascii=False)
    shown = text if len(text) <= _LONGEST_NOTE else text[: _LONGEST_NOTE - 1] + "…"
    when = "" if note.step in (None, step) else f", step {note.step:,}"
    return f"rank {note.rank}{when}: {shown}" + (" (cut when it was logged)" if note.cut else "")


def _what_was_done(run: RunLog, at: int) -> str:
    action = ACTIONS[int(run.action[at])]
    asked = f"; {_DONE[action]}" if action != "none" else ""
    if run.skipped[at]:
        bad = int(run.nonfinite[at])
        if bad:
            what = "1 gradient was" if bad == 1 else f"{bad:,} gradients were"
            return f"skipped: {what} not finite{asked}"
        why = "by the policy" if run.finite[at] else "its norm was not finite"
        if run.details_of(at).differs:
            why = "copies of gradients differed, an error"
        return f"skipped: {why}{asked}"
    if not run.clipped[at]:
        return f"taken as it was{asked}"
    if run.clamps:
        return f"elements clamped, norm {float(run.after[at]):.4g}{asked}"
    return f"clipped to {float(run.after[at]):.4g}{asked}"
