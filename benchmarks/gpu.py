"""`python -m benchmarks --device cuda [CASE ...]`: the cases on a GPU, all in this process."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

from benchmarks.gpu_page import page, text
from benchmarks.records import Row


def main(options: argparse.Namespace) -> int:
    """Measures (or reads what was measured), prints, writes.

    Raises:
        SystemExit: no CUDA device, an unknown case, an option for the CPU, or a case that raised;
            the others are measured nevertheless.
    """
    if options.kernels is not None or options.keep:
        raise SystemExit(
            "benchmarks: --kernels and --keep are for the CPU; leave them out with --device cuda"
        )
    failed: dict[str, str] = {}
    if options.read is not None:
        found = json.loads(options.read.read_text())
        if options.cases:
            found["rows"] = [row for row in found["rows"] if row["case"] in options.cases]
    else:
        found, failed = measured(options.cases, options.quick)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    rows = [Row.from_dict(record) for record in found["rows"]]
    print(text(found, rows))
    if options.plot is not None and rows:
        from benchmarks.plot import draw

        draw(rows, options.plot)
    if options.write is not None:
        picture = (
            None if options.plot is None else os.path.relpath(options.plot, options.write.parent)
        )
        options.write.write_text(page(found, rows, picture))
    if failed:
        raise SystemExit(
            "benchmarks: "
            + "; ".join(f"the case {name!r} raised {error}" for name, error in failed.items())
        )
    return 0


def measured(names: list[str], quick: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """What was found, and which cases raised."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("benchmarks: --device cuda needs a CUDA device, and torch sees none here")
    import gc
    import traceback

    from benchmarks.gpu_cases import CASES, Bench
    from benchmarks.gpu_peers import peers
    from benchmarks.gpu_timing import Cache, machine
    from benchmarks.timing import Effort

    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise SystemExit(
            f"benchmarks: there is no case {unknown[0]!r} on a GPU; the cases are "
            f"{', '.join(CASES)}"
        )
    effort = (
        Effort(seconds=0.1, least=3, most=3, quick=True)
        if quick
        else Effort(seconds=0.6, least=8, most=30)
    )
    cache = Cache()
    here = machine(effort, cache)
    there, missing = peers()
    bench = Bench(
        effort, cache, here["read_gb_s"][0] * 1e9, here["read_write_gb_s"][0] * 1e9, there
    )
    found: dict[str, Any] = {
        "quick": quick,
        "device": "cuda",
        "machine": here,
        "missing": missing,
        "rows": [],
    }
    failed: dict[str, str] = {}
    for name in names or list(CASES):
        start = time.monotonic()
        print(f"{name} ...", end=" ", flush=True, file=sys.stderr)
        try:
            found["rows"] += [row.to_dict() for row in CASES[name].run(bench)]
        except Exception as error:
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{time.monotonic() - start:.0f} s", flush=True, file=sys.stderr)
    return found | {"failed": failed}, failed
