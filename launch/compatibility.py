"""docs/compatibility.md and the README's line of status, from what pytest wrote down under each
release of torch: run by launch/matrix.sh.

compatibility.py versions                        the releases on the page, one a line
compatibility.py add VERSION RESULTS CODE [core] with the interpreter that ran the tests; RESULTS of
--junitxml, CODE of pytest
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
from typing import Any
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
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def page(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: a table, then what failed and why tests were skipped."""
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
    return HEAD + "\n".join([*lines, *notes]) + "\n"


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


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    data = path.with_suffix(".json")
    return json.loads(data.read_text()) if data.exists() else {}


def add(path: Path, release: str, found: dict[str, Any]) -> None:
    """One row more, or in the place of the one that this release had."""
    rows = rows_of(path) | {release: found}
    rows = {name: rows[name] for name in sorted(rows, key=_order)}
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    path.write_text(page(rows))
    readme = path.parents[1] / "README.md"
    if readme.exists():
        said = status(rows, readme.parent)
        readme.write_text(STATUS.sub(lambda _: said, readme.read_text()))


def main(arguments: list[str]) -> None:
    if arguments == ["versions"]:
        print("\n".join(sorted(rows_of(PAGE), key=_order)))
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
