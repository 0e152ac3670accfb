"""`python -m benchmarks [CASE ...]`: distclip against its peers. Prints a table; writes JSON, a
plot, Markdown."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES
from benchmarks.markdown import page
from benchmarks.records import Row
from benchmarks.scaling import block
from benchmarks.table import text

ROOT = Path(__file__).parents[1]
MARKS = (
    "<!-- benchmarks: written by python -m benchmarks, do not edit -->",
    "<!-- /benchmarks -->",
)


def parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:11} {case.line}" for name, case in CASES.items())
    out = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="distclip against its peers, interleaved in one process.",
        epilog=f"cases:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("cases", nargs="*", metavar="CASE", help="which cases; default: all")
    out.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes and few rounds: shows that everything runs, measures nothing",
    )
    out.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: the cases for a GPU (default: cpu)",
    )
    out.add_argument(
        "--kernels",
        choices=("torch", "native", "both"),
        help="force distclip's kernels; default: those it chooses",
    )
    out.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    out.add_argument(
        "--plot", type=Path, metavar="FILE", help="write the ratios as a picture (needs matplotlib)"
    )
    out.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="write Markdown: all of FILE, or its block between the markers",
    )
    out.add_argument(
        "--read",
        type=Path,
        metavar="FILE",
        help="measure nothing: take the figures that --json wrote",
    )
    out.add_argument(
        "--keep", action="store_true", help="keep the other cases that stand in --json FILE already"
    )
    out.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return out


def child(name: str, quick: bool, kernels: str | None) -> dict[str, Any]:
    """One case in a process of its own."""
    environment = dict(os.environ)
    if kernels is not None:
        environment["DISTCLIP_KERNELS"] = kernels
    with tempfile.TemporaryDirectory(prefix="distclip-bench-") as folder:
        target = Path(folder) / "case.json"
        command = [sys.executable, "-m", "benchmarks", name, "--child", "--json", str(target)]
        command += ["--quick"] if quick else []
        command += ["--kernels", kernels] if kernels is not None else []
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False, stdout=sys.stderr)
        if done.returncode:
            raise SystemExit(
                f"benchmarks: the case {name!r} ended with {done.returncode}; its "
                f"output stands above"
            )
        return json.loads(target.read_text())


def measured(names: list[str], quick: bool, kernels: str | None) -> tuple[dict[str, Any], bool]:
    """What was found, and whether all cases came to their end: one that fails is told, and hides
    none of the others."""
    found: dict[str, Any] = {"quick": quick, "machine": None, "rows": []}
    all_ended = True
    for name in names:
        modes = ["torch", "native"] if kernels == "both" else [kernels]
        for mode in modes if CASES[name].by_kernels else modes[-1:]:
            start = time.monotonic()
            print(f"{name}{f' ({mode})' if mode else ''} ...", end=" ", flush=True, file=sys.stderr)
            try:
                one = child(name, quick, mode)
            except SystemExit as failure:
                print(failure, file=sys.stderr)
                all_ended = False
                continue
            print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
            found["rows"] += one.pop("rows")
            here = one.pop("machine")
            # the least disturbed
            found["machine"] = max(found["machine"] or here, here, key=lambda m: m["read_gb_s"][0])
            found |= one
    return found, all_ended


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.device == "cuda":
        from benchmarks.gpu import main as on_a_gpu

        return on_a_gpu(options)
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        raise SystemExit(
            f"benchmarks: there is no case {unknown[0]!r}; the cases are {', '.join(CASES)}"
        )
    if options.child:
        from benchmarks.runner import run

        options.json.write_text(json.dumps(run(options.cases[0], options.quick, options.kernels)))
        return 0
    all_ended = True
    if options.read is not None:
        found = json.loads(options.read.read_text())
        if options.cases:
            found["rows"] = [row for row in found["rows"] if row["case"] in options.cases]
    else:
        names = options.cases or list(CASES)
        found, all_ended = measured(names, options.quick, options.kernels)
        if not found["rows"]:
            return 1
        if options.keep and options.json is not None and options.json.exists():
            before = json.loads(options.json.read_text())
            found["rows"] += [row for row in before.pop("rows") if row["case"] not in names]
            found["rows"].sort(key=lambda row: list(CASES).index(row["case"]))
            found = (
                before
                | found
                | {
                    "machine": max(
                        before["machine"], found["machine"], key=lambda m: m["read_gb_s"][0]
                    )
                }
            )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")

    rows = [Row.from_dict(record) for record in found["rows"]]
    print(text(found["machine"], rows, found["quick"]))
    if found.get("scale"):
        print(block(found["scale"]))
    if options.plot is not None:
        from benchmarks.plot import draw

        draw(rows, options.plot)
    if options.write is not None:
        write(options.write, found, rows, options.plot)
    return 0 if all_ended else 1


def write(target: Path, found: dict[str, Any], rows: list[Row], plot: Path | None) -> None:
    """All of `target`, or its block between the markers: the scale's tables where only they were
    measured."""
    marked = target.exists() and MARKS[0] in target.read_text()
    if not marked:
        target.write_text(
            page(found["machine"], rows, os.path.relpath(plot, target.parent) if plot else None)
        )
        return
    if not found.get("scale"):
        raise SystemExit(
            f"benchmarks: {target} has a block for the case `scale`, which was not run"
        )
    before, rest = target.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    target.write_text(f"{before}{MARKS[0]}\n\n{block(found['scale'])}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    raise SystemExit(main())
