"""The doctor's output: a table of at most 100 columns, or one JSON document. Plain text, no
colours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

from distclip.cli.doctor.facts import format_nodes
from distclip.cli.doctor.records import CheckResult, name_ranks, ranks_by_value

COLUMNS = 100
HIDDEN_FACTS = ("host", "device id")  # shown by `format_nodes`, or needed for the comparison alone


@dataclass(slots=True)
class DoctorOutput:
    """The facts and results so far."""

    facts: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # by rank
    results: list[CheckResult] = field(default_factory=list[CheckResult])
    stopped: str = ""  # why the doctor did not get to the end
    hint: str = ""  # the command line for checks that need more ranks

    @property
    def exit_code(self) -> int:
        """0: all passed; 1: a check failed; 2: it did not get to the end."""
        if self.stopped:
            return 2
        return int(any(result.result == "fail" for result in self.results))

    def summary(self) -> dict[str, int]:
        kinds = ("pass", "fail", "measured", "not run")
        return {kind: sum(result.result == kind for result in self.results) for kind in kinds}

    def shared_facts(self) -> dict[str, dict[str, str]]:
        """For each fact its values, each with the ranks that have it."""
        if not self.facts:
            return {}
        names = [name for name in self.facts[0] if name not in HIDDEN_FACTS]
        return {
            name: {
                v: name_ranks(r)
                for v, r in ranks_by_value([one[name] for one in self.facts]).items()
            }
            for name in names
        }


def as_json(findings: DoctorOutput) -> str:
    """One document: world, nodes, facts, checks, summary, stopped, exit_code."""
    document = {
        "world": len(findings.facts),
        "nodes": format_nodes(findings.facts),
        "facts": findings.shared_facts(),
        "checks": [
            {"name": r.name, "result": r.result, "seen": r.seen, "do": r.remedy}
            for r in findings.results
        ],
        "summary": findings.summary(),
        "hint": findings.hint,
        "stopped": findings.stopped,
        "exit_code": findings.exit_code,
    }
    return json.dumps(document, indent=2)


def as_table(findings: DoctorOutput) -> str:
    """Facts, then the checks with their remedies, then the summary."""
    lines: list[str] = []
    if findings.facts:
        size = len(findings.facts)
        lines += _fact_lines([("ranks", str(size)), ("nodes", format_nodes(findings.facts))])
        for name, values in findings.shared_facts().items():
            one = len(values) == 1
            text = (
                next(iter(values))
                if one
                else ", ".join(f"{value} ({ranks})" for value, ranks in values.items())
            )
            if text not in ("not set", "not installed", "none"):
                lines += _fact_lines([(name, text)])
        lines.append("")
    lines += [f"{'check':<10}{'result':<10}what was seen", "-" * COLUMNS]
    for result in findings.results:
        first, *rest = wrap(result.seen, COLUMNS - 20) or [""]
        lines += [
            f"{result.name:<10}{result.result:<10}{first}",
            *(" " * 20 + line for line in rest),
        ]
        if result.remedy:
            lines += [" " * 20 + line for line in wrap(f"do: {result.remedy}", COLUMNS - 20)]
    lines += [
        "",
        ", ".join(f"{count} {kind}" for kind, count in findings.summary().items() if count),
    ]
    if findings.hint:
        lines += wrap(findings.hint, COLUMNS)
    if findings.stopped:
        lines += wrap(f"stopped: {findings.stopped}", COLUMNS)
    return "\n".join(lines)


def _fact_lines(pairs: Sequence[tuple[str, str]]) -> list[str]:
    lines: list[str] = []
    for name, value in pairs:
        first, *rest = wrap(value, COLUMNS - 20) or [""]
        lines += [f"{name:<20}{first}", *(" " * 20 + line for line in rest)]
    return lines
