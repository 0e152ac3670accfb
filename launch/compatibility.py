"""docs/compatibility.md and the README's line of status, from what pytest wrote down under each
release of torch and in the environment of other packages' programs: run by launch/matrix.sh and
launch/programs.sh.

compatibility.py versions                        the releases on the page, one a line
compatibility.py add VERSION RESULTS CODE [core] with the interpreter that ran the tests; RESULTS of
--junitxml, CODE of pytest
compatibility.py programs RESULTS CODE           likewise, of launch/programs.sh
"""

from __future__ import annotations

import json
import platform
import re
import sys
from collections import Counter
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
STATUS = re.compile(
    r"(?<=<!-- status: written by launch/matrix.sh -->\n).*?(?=<!-- end of status)", re.S
)
FRAMEWORKS = ("accelerate", "transformers", "lightning", "deepspeed")
HEAD = """# Releases of torch, Python and frameworks

distclip asks for `torch >= 2.8`, Python >= 3.10, and for no upper bound. Installing it changes no torch that is already there. These are
the releases that its tests were run with, on the CPU with gloo: layouts, precision, policies, faults, kernels, integrations, the doctor and
what needs one process; rows marked "core" leave out integrations, the doctor, and builds and threads of the kernels. With any other
series of torch the first clipper says so once, by the logger `distclip`. The release that `constraints.txt` pins is run whole by
`launch/test.sh`, at each change.

`launch/matrix.sh VERSION…` makes an environment for each release, runs the tests there and writes this page and
[`compatibility.json`](compatibility.json); rows of other releases stay as they are. No number here was written by hand.

"""

PROGRAMS_HEAD = """
## Programs of other packages

Small trainings that other packages bring or that their users write, with random weights and data, on the CPU: once with their own clipping,
once with distclip's lines in its place, imports counted. "Loss" and "norm" are the largest relative differences over all steps; torch's own
norm of float32 is off by up to 1e-4 on a CPU. `launch/programs.sh` runs `tests/programs` and writes this table and
[`programs.json`](programs.json).

"""
INTEGRATIONS_HEAD = """
## Integrations

What each honours and refuses by name, and the versions that the runs above had. Every entry is tested in the file that stands beside it.

"""


class Integration(NamedTuple):
    call: str
    honoured: str
    refused: str
    tests: str  # a file of tests/integrations


INTEGRATIONS = {
    "accelerate": Integration(
        "`prepare(accelerator, model, max_norm=…)`",
        "one process, DDP, FSDP1, FSDP2, DeepSpeed; `ParallelismConfig`: HSDP, tensor parallelism with FSDP2; compiled models; accumulation; "
        "several models, optimizers and one scaler; parts of a model; by value; `save_state`",
        "a second threshold for one model; `join_uneven_inputs`; under DeepSpeed parts and values after `backward()`; `grad_of`",
        "test_accelerate.py",
    ),
    "transformers": Integration(
        "`clip_with_distclip(trainer)`",
        "`max_grad_norm` or a policy; one process, DDP, FSDP1, FSDP2, DeepSpeed; several `train()`; resume; norm, coefficient and rate in "
        "the log",
        "a policy with `max_grad_norm=0`; attaching twice",
        "test_transformers.py",
    ),
    "lightning": Integration(
        "`GradientClipping(max_norm=…)`; Fabric: `prepare(fabric, model, …)`",
        "automatic and manual optimization; DDP, FSDP2, tensor parallelism with FSDP2; unfreezing; searches; checkpoints; AMP",
        "`gradient_clip_val` beside it; DeepSpeed's strategy; a second clip in a step",
        "test_lightning.py",
    ),
    "deepspeed": Integration(
        "`attach(engine, max_norm=…)`",
        "ZeRO 0–3, offload to the CPU; float32, bfloat16, float16; accumulation; experts; the pipeline engine; several engines; groups",
        "`gradient_clipping` beside it; a model-parallel `mpu`; AutoEP's experts; autocast with a scaler; Muon with fp16",
        "test_deepspeed.py",
    ),
    "megatron": Integration(
        "`attach(optimizer, model, max_norm=…)`",
        "Megatron's marks, process groups and main gradients; the distributed optimizer's shards; chained optimizers; experts",
        "`clip_grad` beside it; optimizers of other kinds; process groups that are not initialised; attaching twice",
        "test_megatron.py",
    ),
    "torchtitan": Integration(
        "`clip_with_distclip(trainer)`, or `--override.imports distclip.integrations.torchtitan.clip`",
        "FSDP2, tensor parallelism with and without it, pipelines, experts with their balancing; `training.max_norm` or a policy; its log; "
        "its checkpoints",
        "attaching twice; a trainer whose step clips elsewhere, twice or not at all; `grad_of`, `process_group`; a `max_norm` that changes",
        "test_torchtitan.py",
    ),
}


def outcomes(results: Path, code: int) -> dict[str, Any]:
    """Of one run: how many tests passed, failed and were skipped, in all and by framework; which
    failed; why some were skipped.

    A run that was ended before its end, or could not begin, has a word for it in `stopped`.
    """
    cases = list(ElementTree.parse(results).iter("testcase")) if results.exists() else []
    counts, frameworks = Counter[str](), {name: Counter[str]() for name in FRAMEWORKS}
    failures: list[str] = []
    reasons = Counter[str]()
    for case in cases:
        kind, where, name = _kind(case), case.get("classname", ""), case.get("name", "")
        # the latter: a file that was left out
        if where.startswith("tests.integrations.") or ("integrations" in name and not where):
            framework = next((f for f in FRAMEWORKS if f"test_{f}" in where + name), None)
            if framework:
                frameworks[framework][kind] += 1
        else:
            counts[kind] += 1
        if kind == "failed":
            failures.append(f"{where}::{name}")
        if kind == "skipped":
            reasons[str(case.find("skipped").get("message"))] += 1  # pyright: ignore[reportOptionalMemberAccess]
    stopped = {0: "", 1: "", 124: "ended by the time limit"}.get(
        code, f"pytest ended with code {code}"
    )
    return {
        "counts": {kind: counts[kind] for kind in ("passed", "failed", "skipped")},
        "frameworks": {name: dict(found) for name, found in frameworks.items()},
        "failures": sorted(failures),
        "skipped": dict(sorted(reasons.items())),
        "stopped": stopped,
    }


def _kind(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "passed" if case.find("skipped") is None else "skipped"


def row(results: Path, code: int) -> dict[str, Any]:
    """`outcomes`, and what the tests ran with: this interpreter and what is installed for it."""
    versions = {name: _version(name) for name in ("torch", *FRAMEWORKS, "triton")}
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "versions": versions,
        **outcomes(results, code),
    }


def _version(package: str) -> str:
    """Of what is installed; empty where it is not."""
    try:
        return version("megatron-core" if package == "megatron" else package)
    except PackageNotFoundError:
        return ""


def page(rows: dict[str, dict[str, Any]], found: dict[str, Any] | None = None) -> str:
    """Markdown: a table, what failed and why tests were skipped; programs, where they were run, and
    integrations."""
    columns = ["torch", "Python", "passed", "failed", "skipped", *FRAMEWORKS, "date"]
    lines = [
        "| " + " | ".join(columns) + " |",
        "|---|---|---:|---:|---:|" + "---|" * (len(FRAMEWORKS) + 1),
    ]
    notes: list[str] = []
    for release in sorted(rows, key=_order):
        one = rows[release]
        counts = one["counts"]
        marks = [mark for mark in ("core" if one.get("core") else "", one["stopped"]) if mark]
        passed = f"{counts['passed']}" + (f" ({', '.join(marks)})" if marks else "")
        cells = [release, one["python"], passed, str(counts["failed"]), str(counts["skipped"])]
        cells += [_framework(one["versions"][name], one["frameworks"][name]) for name in FRAMEWORKS]
        lines.append("| " + " | ".join([*cells, one["date"]]) + " |")
        said = [f"* failed: `{name}`" for name in one["failures"]]
        said += [f"* {count} skipped: {reason}" for reason, count in one["skipped"].items()]
        notes += [f"\n## torch {release}\n", *said] if said else []
    text = HEAD + "\n".join([*lines, *notes]) + "\n"
    return text + programs_table(found) + integrations_table(rows, found) if found else text


def programs_found(results: Path, code: int) -> dict[str, Any]:
    """What `tests/programs` and the integrations' tests told in one run."""
    programs: dict[str, Any] = {}
    frameworks: dict[str, Any] = {}
    failures: list[str] = []
    for case in ElementTree.parse(results).iter("testcase"):
        where, name = case.get("classname", ""), case.get("name", "")
        kind = _kind(case)
        if kind == "failed":
            failures.append(f"{where}::{name}")
        for told in case.iter("property"):
            if told.get("name") == "program":
                program = name.partition("[")[2].rstrip("]")
                programs[program] = json.loads(str(told.get("value"))) | {"result": kind}
        framework = where.removeprefix("tests.integrations.test_")
        if framework in INTEGRATIONS:
            counts = frameworks.setdefault(framework, {"version": _version(framework)})
            counts[kind] = counts.get(kind, 0) + 1
    return {
        "torch": _version("torch"), "python": platform.python_version(),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}", "programs": programs,
        "frameworks": frameworks, "failures": sorted(failures),
        "stopped": "" if code in (0, 1) else f"pytest ended with code {code}",
    }  # fmt: skip


def programs_table(found: dict[str, Any]) -> str:
    lines = [
        "| program | with | ranks | lines | steps | loss | norm | |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, one in sorted(found["programs"].items()):
        versions = ", ".join(f"{package} {release}" for package, release in one["versions"].items())
        norm = "not told" if one["norms"] is None else f"{one['norms']:.0e}"
        link = f"[`{name}`](../tests/programs/{name}.py)"
        cells = [link, versions, one["ranks"], one["lines"], one["steps"], f"{one['losses']:.0e}"]
        lines.append("| " + " | ".join(map(str, [*cells, norm, one["result"]])) + " |")
    said = [f"\ntorch {found['torch']}, Python {found['python']}, {found['date']}."]
    said += [f"* failed: `{name}`" for name in found["failures"]]
    said += [f"* {found['stopped']}"] if found["stopped"] else []
    return PROGRAMS_HEAD + "\n".join([*lines, *said]) + "\n"


def integrations_table(rows: dict[str, dict[str, Any]], found: dict[str, Any]) -> str:
    """One row for each of `INTEGRATIONS`; its versions are those that some run on this page had."""
    lines = ["| | call | honoured | refused | tests | run with |", "|---|---|---|---|---|---|"]
    for name, one in INTEGRATIONS.items():
        ran = {
            row["versions"][name]
            for row in rows.values()
            if row["frameworks"].get(name, {}).get("passed") and row["versions"].get(name)
        }
        ran |= {
            program["versions"][name]
            for program in found["programs"].values()
            if name in program["versions"] and program["result"] == "passed"
        }
        if found["frameworks"].get(name, {}).get("passed"):
            ran.add(found["frameworks"][name]["version"])
        tests = f"[`{one.tests}`](../tests/integrations/{one.tests})"
        cells = [name, one.call, one.honoured, one.refused, tests]
        versions = ", ".join(sorted(ran)) or "the pinned one"
        lines.append("| " + " | ".join([*cells, versions]) + " |")
    return INTEGRATIONS_HEAD + "\n".join(lines) + "\n"


def _framework(release: str, counts: dict[str, int]) -> str:
    if not release or not (counts.get("passed") or counts.get("failed")):
        return "not run"
    failed = f", **{counts['failed']} failed**" if counts.get("failed") else ""
    return f"{release}: {counts.get('passed', 0)} passed{failed}"


def status(rows: dict[str, dict[str, Any]], root: Path) -> str:
    """The README's line: which torch, Python and platform the tests passed with, and which GPU."""
    good = {
        release: row for release, row in rows.items() if not (row["failures"] or row["stopped"])
    }
    bad = [release for release in sorted(rows, key=_order) if release not in good]
    pythons = {".".join(row["python"].split(".")[:2]) for row in good.values()}
    where = sorted({row["platform"] for row in good.values() if "platform" in row})
    (pinned,) = re.findall(r"^torch==(\S+)", (root / "constraints.txt").read_text(), re.M)
    gpu = json.loads((root / "benchmarks" / "results_gpu.json").read_text())["machine"]
    line = (
        f"**Status**: tests pass with torch {', '.join(sorted(good, key=_order))} (Python "
        f"{', '.join(sorted(pythons, key=_order))}; {', '.join(where)}; CPU, gloo), at each change with "
        f"{pinned}; on a GPU: one {gpu['device']}, torch {gpu['torch'].partition('+')[0]}."
    )
    if bad:
        line += f" Some fail with {', '.join(bad)}."
    return f"{line} [Table](docs/compatibility.md)\n"


def _order(release: str) -> list[int]:
    return [int(part) for part in release.split(".")]


def programs_of(path: Path) -> dict[str, Any]:
    """What launch/programs.sh found last, beside the page."""
    data = path.with_name("programs.json")
    return json.loads(data.read_text()) if data.exists() else {}


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    data = path.with_suffix(".json")
    return json.loads(data.read_text()) if data.exists() else {}


def add(path: Path, release: str, found: dict[str, Any]) -> None:
    """One row more, or in the place of the one that this release had."""
    rows = rows_of(path) | {release: found}
    rows = {name: rows[name] for name in sorted(rows, key=_order)}
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    path.write_text(page(rows, programs_of(path)))
    readme = path.parents[1] / "README.md"
    if readme.exists():
        said = status(rows, readme.parent)
        readme.write_text(STATUS.sub(lambda _: said, readme.read_text()))


def add_programs(path: Path, found: dict[str, Any]) -> None:
    path.with_name("programs.json").write_text(json.dumps(found, indent=1) + "\n")
    path.write_text(page(rows_of(path), found))


def main(arguments: list[str]) -> None:
    if arguments == ["versions"]:
        print("\n".join(sorted(rows_of(PAGE), key=_order)))
    elif arguments[:1] == ["programs"] and len(arguments) == 3:
        add_programs(PAGE, programs_found(Path(arguments[1]), int(arguments[2])))
    elif arguments[:1] == ["add"] and (len(arguments) == 4 or arguments[4:] == ["core"]):
        add(
            PAGE,
            arguments[1],
            row(Path(arguments[2]), int(arguments[3])) | {"core": arguments[4:] == ["core"]},
        )
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
