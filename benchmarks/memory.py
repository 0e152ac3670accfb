"""Peak memory that a call takes beside the gradients: the process' resident high-water mark, reset
before it (Linux)."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

import distclip
from benchmarks import problems
from benchmarks.floors import MEMORY
from benchmarks.records import Row, Spread
from benchmarks.single import CLIP, DROP_IN, DTYPES, TORCH
from benchmarks.timing import Effort

MIB = 1 << 20


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(f"{field}:")
    )
    return int(line.split()[1]) * 1024


def peak(run: Callable[[], object]) -> int:
    """Bytes by which the resident set rose above what it was before, at most.

    Raises:
        SystemExit: the peak cannot be reset here.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what an earlier call freed must be asked for again
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise SystemExit(
            f"benchmarks: the case `memory` resets this process' peak in "
            f"/proc/self/clear_refs: {error}"
        ) from None
    before = status("VmRSS")
    run()
    return max(0, status("VmHWM") - before)


def memory(effort: Effort, kernels: str) -> list[Row]:
    rows: list[Row] = []
    for name, shapes in (("GPT-2's shapes", problems.gpt2), ("5,000 small", problems.small)):
        for dtype_name, dtype in DTYPES.items():
            params = problems.parameters(shapes(effort.quick), dtype)
            grads = [p.grad for p in params if p.grad is not None]
            norm, restore = float(distclip.get_total_norm(grads)), problems.restorer(grads)
            clipper = distclip.GradClipper(problems.named(params), norm / 2)
            limit = (MEMORY[0] + MEMORY[1] * len(params)) / MIB if kernels == "native" else None
            runs = {
                CLIP: clipper.clip_,
                DROP_IN: dropping(distclip.clip_grad_norm_, params, norm),
                TORCH: dropping(clip_grad_norm_, params, norm),
            }
            for ours, run in runs.items():
                peaks: list[float] = []
                for _ in range(3 if effort.quick else 5):
                    restore()
                    peaks.append(peak(run) / MIB)
                asked = (
                    {"floor": limit, "issue": limit is not None, "at_least": False}
                    if ours != TORCH
                    else {}
                )
                note = f"first call {peaks[0]:.2f} MiB" + (
                    " (warm: the norm was measured before)" if ours == DROP_IN else ""
                )
                rows.append(
                    Row(
                        "memory",
                        f"{name} {dtype_name}, active",
                        Spread.of(peaks[1:]),
                        "MiB",
                        ours,
                        kernels=kernels,
                        note=note,
                        **asked,
                    )
                )
            size = sum(g.numel() * g.element_size() for g in grads) / MIB
            what = f"{name} {dtype_name}: the gradients themselves"
            rows.append(Row("memory", what, Spread.of([size]), "MiB", "", kernels=kernels))
    return rows


def dropping(
    function: Callable[..., object], params: list[torch.nn.Parameter], norm: float
) -> Callable[[], object]:
    return lambda: function(params, norm / 2)
