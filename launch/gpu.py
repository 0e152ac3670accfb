"""What `launch/gpu.sh` runs: one part after the other, each with its own time limit; then one
table, and JSON, Markdown and a picture."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

VERSIONS = """
import importlib.util, json, platform, torch
found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda, "triton": None, "nccl": None}
if importlib.util.find_spec("triton"):
    import triton
    found["triton"] = triton.__version__
if torch.cuda.is_available():
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
count = torch.cuda.device_count()
found["devices"] = [torch.cuda.get_device_name(i) + ", capability %d.%d" % torch.cuda.get_device_capability(i) for i in range(count)]
import distclip
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    command: Sequence[str]
    limit_s: int
    figure: Callable[[str], str]  # of its output
    device: bool = True  # whether it needs one


@dataclass(frozen=True, slots=True)
class Outcome:
    name: str
    result: str  # passed, failed, not run
    figure: str
    seconds: float = 0.0
    output: str = ""


def parts(folder: Path, ranks: int, dry: bool) -> list[Part]:
    """In the order in which they run; their limits add up to less than 8 minutes."""
    python, measured = sys.executable, str(folder / "benchmark.json")
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/kernels"]
    # which say so where their frameworks are not there
    tests += [f"tests/integrations/test_{name}.py" for name in ("megatron", "torchtitan")]
    start = [
        python,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "-m",
    ]
    benchmark = [python, "-m", "benchmarks", "--device", "cuda"]
    collected = Part("tests collected", [*tests, "--collect-only"], 60, last_line, device=False)
    return [
        *([collected] if dry else []),
        Part("pytest -m gpu", tests, 120, last_line),
        Part(
            f"distclip doctor, NCCL, {ranks} rank{'s' if ranks > 1 else ''}",
            [*start, "distclip", "doctor", "--backend", "nccl"],
            60,
            checks,
        ),
        Part("benchmark", [*benchmark, "--json", measured], 180, reached),
        Part(
            "picture",
            [*benchmark, "--read", measured, "--plot", str(folder / "gpu.png")],
            30,
            lambda _: "gpu.png",
        ),
    ]


def last_line(output: str) -> str:
    lines = [line.strip("= ") for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def checks(output: str) -> str:
    found = re.findall(r"^\d+ (?:pass|fail|measured|not run)\b.*$", output, re.MULTILINE)
    return found[-1] if found else last_line(output)


def reached(output: str) -> str:
    found = re.findall(
        r"^\d+ of \d+ floors reached; of \d+ other comparisons \d+ slower", output, re.MULTILINE
    )
    return found[-1] if found else last_line(output)


def run(part: Part) -> Outcome:
    """In a session of its own, which is ended whole when its time is over."""
    start = time.monotonic()
    process = subprocess.Popen(
        part.command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=part.limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return Outcome(
            part.name,
            "failed",
            f"not done within {part.limit_s} s",
            time.monotonic() - start,
            output,
        )
    figure = part.figure(output)
    if process.returncode:
        return Outcome(
            part.name,
            "failed",
            f"exit code {process.returncode}: {figure}",
            time.monotonic() - start,
            output,
        )
    return Outcome(part.name, "passed", figure, time.monotonic() - start, output)


def versions() -> tuple[Outcome, list[str]]:
    """The machine, and its devices."""

    def figure(output: str) -> str:
        found = json.loads(output.splitlines()[-1])
        devices = ", ".join(found.pop("devices")) or "no CUDA device"
        return f"{devices}; " + ", ".join(
            f"{name} {value or 'none'}" for name, value in found.items()
        )

    def shown(output: str) -> str:
        try:
            return figure(output)
        except (ValueError, IndexError):
            return last_line(output)

    outcome = run(
        Part("versions and device", [sys.executable, "-c", VERSIONS], 60, shown, device=False)
    )
    if outcome.result != "passed":
        return outcome, []
    return outcome, list(json.loads(outcome.output.splitlines()[-1])["devices"])


def table(outcomes: Sequence[Outcome]) -> str:
    rows = [
        ("what", "result", "seconds", "figure"),
        *((o.name, o.result, f"{o.seconds:.0f}", o.figure) for o in outcomes),
    ]
    width = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, width)), row[3]]) for row in rows
    )


def write(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """gpu.json and gpu.md; gpu.png was drawn by its part."""
    measured = folder / "benchmark.json"
    benchmark = json.loads(measured.read_text()) if measured.exists() else None
    (folder / "gpu.json").write_text(
        json.dumps({"parts": [asdict(o) for o in outcomes], "benchmark": benchmark}, indent=1)
        + "\n"
    )
    lines = [
        "# distclip on this machine's GPUs\n",
        "| what | result | seconds | figure |",
        "|---|---|---:|---|",
    ]
    lines += [f"| {o.name} | {o.result} | {o.seconds:.0f} | {o.figure} |" for o in outcomes]
    lines += [
        f"\n## {o.name}: what it said last\n\n```\n{o.output[-6000:].strip()}\n```"
        for o in outcomes
        if o.result == "failed"
    ]
    text = "\n".join(lines) + "\n"
    if benchmark is not None:
        from benchmarks.gpu_page import page
        from benchmarks.records import Row

        picture = "gpu.png" if (folder / "gpu.png").exists() else None
        text += "\n" + page(
            benchmark, [Row.from_dict(record) for record in benchmark["rows"]], picture
        )
    (folder / "gpu.md").write_text(text)


def main() -> int:
    """0 if all passed; with --dry, if all that needs no device did."""
    parser = argparse.ArgumentParser(
        prog="launch/gpu.sh",
        description="distclip on this machine's GPUs: tests, doctor, benchmark.",
    )
    parser.add_argument(
        "--dry", action="store_true", help="run what needs no device, and list the rest as not run"
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("runs/gpu"),
        metavar="FOLDER",
        help="for the results (default: runs/gpu)",
    )
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("benchmark.json", "gpu.json", "gpu.md", "gpu.png"):
        (folder / name).unlink(missing_ok=True)  # of an earlier run
    first, devices = versions()
    print(f"{first.name}: {first.result}: {first.figure}", flush=True)
    outcomes = [first]
    for part in parts(folder, max(1, len(devices)), options.dry):
        if part.device and options.dry:
            outcome = Outcome(part.name, "not run", "needs a CUDA device")
        elif part.device and not devices:
            outcome = Outcome(
                part.name,
                "failed",
                "torch sees no CUDA device; launch/gpu.sh --dry runs what needs none",
            )
        else:
            outcome = run(part)
        print(f"{outcome.name}: {outcome.result}: {outcome.figure}", flush=True)
        if outcome.result == "failed" and outcome.output:
            print(outcome.output[-6000:], flush=True)
        outcomes.append(outcome)
    write(folder, outcomes)
    print(
        f"\n{table(outcomes)}\n\nwritten to {folder}: "
        + ", ".join(sorted(path.name for path in folder.iterdir()))
    )
    return int(any(outcome.result == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    raise SystemExit(main())
