"""Sinks for experiment trackers. Each needs a package that is imported when the sink is made, not
before."""

from __future__ import annotations

import math
import weakref
from importlib import import_module
from os import PathLike, fspath
from typing import Any, Protocol

from distclip.errors import ConfigError
from distclip.records import ClipReport
from distclip.report.sinks import checked_every, is_due

_SCALARS = (
    "total_norm",
    "norm_after",
    "clipped",
    "skipped",
    "nonfinite",
    "clip_rate",
    "skips",
    "clip_coef",
)
_MOST_GROUPS = 50  # more curves than this help nobody; a tracker keeps each as a series of its own


def report_scalars(report: ClipReport) -> dict[str, float]:
    """What trackers draw, as floats under `clip/…`: norms, coefficient, threshold, clip rate,
    skips; robust deviation and the norm of each layer where known.

    With up to 50 groups, norm, coefficient and threshold of each; with more, only the largest group
    norm and the smallest coefficient. A threshold of inf (no clipping) is not drawn.
    """
    said = report.to_dict()
    out = {f"clip/{name}": float(said[name]) for name in _SCALARS if name in said}
    if report.deviation is not None:
        out["clip/deviation"] = report.deviation
    groups: list[str] = said["groups"]
    if len(groups) > _MOST_GROUPS:
        out |= {
            "clip/largest_group_norm": max(said["group_norms"]),
            "clip/smallest_coef": min(said["coefs"]),
        }
    elif len(groups) > 1:
        for name, norm, coef in zip(groups, said["group_norms"], said["coefs"], strict=True):
            out |= {f"clip/group_norm/{name}": norm, f"clip/coef/{name}": coef}
    if len(groups) <= _MOST_GROUPS:
        for name, threshold in zip(groups, said["threshold"], strict=True):
            if math.isfinite(threshold):
                out[f"clip/threshold/{name}" if len(groups) > 1 else "clip/threshold"] = threshold
    for name, norm in zip(said.get("layers", ()), said.get("layer_norms", ())):
        out[f"clip/layer_norm/{name}"] = norm
    return out


class TensorBoardSink:
    """Scalars under `clip/…` through torch.utils.tensorboard; culprits and notes as texts.

    Args:
        log_dir: a folder, or a SummaryWriter that you have; None on a rank that does not write. A
            writer made here is flushed and closed when the program ends.
        every: write each `every`-th step, and all that matter (`ClipReport.matters`).

    Raises:
        ConfigError: the package tensorboard is missing, `log_dir` is neither folder nor writer, or
            `every` is not a whole number of at least 1.
    """

    def __init__(self, log_dir: str | PathLike[str] | Any, every: int = 1) -> None:
        self.every = checked_every("TensorBoardSink", every)
        self._log_dir = fspath(log_dir) if isinstance(log_dir, (str, PathLike)) else None
        self._writer: Any = None if self._log_dir is not None else log_dir
        if self._log_dir is not None:
            _summary_writer()
        elif log_dir is not None and not callable(getattr(log_dir, "add_scalar", None)):
            raise ConfigError(
                f"TensorBoardSink: log_dir={log_dir!r} is neither a folder nor a SummaryWriter"
            )

    @property
    def lacks(self) -> str:
        """What it cannot write without, or an empty text."""
        return "its writer is None" if self._log_dir is None and self._writer is None else ""

    def write(self, report: ClipReport) -> None:
        if self.lacks or not is_due(report, self.every):
            return
        # not before: a writer makes its file at once, also on ranks that never write
        if self._writer is None:
            self._writer = _summary_writer()(self._log_dir)
            weakref.finalize(self, self._writer.close)
        for name, value in report_scalars(report).items():
            self._writer.add_scalar(name, value, report.step)
        if report.culprits:
            text = "; ".join(f"{c.parameter} on rank {c.rank}: {c.kind}" for c in report.culprits)
            self._writer.add_text("clip/culprits", text, report.step)
        if report.notes:
            text = "\n\n".join(f"rank {n.rank}, step {n.step}: {n.note}" for n in report.notes)
            self._writer.add_text("clip/notes", text, report.step)


def _summary_writer() -> Any:
    try:
        return import_module("torch.utils.tensorboard.writer").SummaryWriter
    except ImportError as error:
        raise ConfigError(
            'TensorBoardSink needs the package tensorboard: pip install "distclip[tensorboard]"'
        ) from error


class _WandbRun(Protocol):
    def log(self, data: dict[str, Any], step: int) -> Any: ...


class WandbSink:
    """Scalars under `clip/…` to a run of Weights & Biases, with the clipper's step as `step=`.

    W&B drops what has a lower step than was logged before: pass `step=report.step` with your own
    metrics too.

    Args:
        run: what `wandb.init()` gave; anything with `log(dict, step=)`. You finish it. None on a
            rank that does not write.
        every: write each `every`-th step, and all that matter (`ClipReport.matters`).

    Raises:
        ConfigError: `run` has no `log`, or `every` is not a whole number of at least 1.
    """

    def __init__(self, run: _WandbRun | None, every: int = 1) -> None:
        self.every = checked_every("WandbSink", every)
        if run is not None and not callable(getattr(run, "log", None)):
            raise ConfigError(
                f"WandbSink: {run!r} has no log(dict, step=); pass what wandb.init() gave"
            )
        self.run = run

    @property
    def lacks(self) -> str:
        """What it cannot write without, or an empty text."""
        return "its run is None" if self.run is None else ""

    def write(self, report: ClipReport) -> None:
        if self.run is not None and is_due(report, self.every):
            self.run.log(report_scalars(report), step=report.step)
