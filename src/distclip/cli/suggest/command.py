"""`distclip suggest RUN...`: what each max_norm would have done to a run, and a recommendation."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from distclip.cli.log_reader import RunError, read_runs
from distclip.cli.norm_history import NormHistory
from distclip.cli.run_log import RunLog
from distclip.cli.suggest.advice import (
    NormCandidate,
    find_candidates,
    percent,
    recommend_max_norm,
    times,
)
from distclip.cli.suggest.findings import find_findings


def run(options: argparse.Namespace) -> int:
    """Returns the exit code: 0, or 2 if a log cannot be used."""
    try:
        runs, left_out = read_runs(options.runs, _check_trains)
    except RunError as error:
        print(f"distclip suggest: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(
            json.dumps(
                {"runs": [_json_record(one) for one in runs], "left_out": left_out}, indent=2
            )
        )
    else:
        print("\n\n".join(_plain_text(one) for one in runs))
        for note in left_out:
            print(f"note: {note}", file=sys.stderr)
    return 0


def _check_trains(one: RunLog) -> None:
    if not bool((one.norm > 0).any()):
        raise RunError(
            f"{one.path}: none of its {len(one.step)} steps has a finite norm above 0; "
            f"log a run that trains"
        )


def _json_record(one: RunLog) -> dict[str, Any]:
    history = NormHistory(one)
    advice, findings = recommend_max_norm(history), find_findings(history)
    return {
        "run": one.path,
        "name": one.name,
        "steps": len(one.step),
        "not_finite": int((~one.finite).sum()),
        "skipped": int(one.skipped.sum()),
        "clipped_share": float(one.clipped.mean()),
        "thresholds": [limit if math.isfinite(limit) else None for limit in one.limits],
        "candidates": [vars(candidate) for candidate in find_candidates(one, advice.max_norm)],
        "recommendation": vars(advice),
        "warnings": [finding.text for finding in findings],
        "findings": [vars(finding) for finding in findings],
        "notes": list(one.notes),
    }


def _plain_text(one: RunLog) -> str:
    history = NormHistory(one)
    advice, findings = recommend_max_norm(history), find_findings(history)
    steps = "1 step" if len(one.step) == 1 else f"{len(one.step):,} steps"
    had = any(math.isfinite(limit) for limit in one.limits)
    clipped = f"{percent(float(one.clipped.mean()))} clipped" if had else "no threshold was set"
    first = [f"warning: {finding.text}" for finding in findings]
    leading = 1 if findings and findings[0].kind in ("skipped", "few", "diverged") else 0
    lines = [
        f"{one.path}: {steps}, {clipped}; norms before clipping",
        *first[:leading],
        "",
        f"{'percentile':>10}  {'max_norm':>10}  would have clipped  longer steps than it took",
        *map(_candidate_row, find_candidates(one, advice.max_norm)),
        "",
        f"recommendation: {advice.setting}, {advice.reason}",
        *first[leading:],
    ]
    lines += [f"note: {text}" for text in one.notes]
    return "\n".join(lines)


def _candidate_row(candidate: NormCandidate) -> str:
    name = "max" if candidate.percentile == 100 else f"{candidate.percentile:g}"
    longer = (
        f"{percent(candidate.longer_share)}, by {times(candidate.longer_factor)} times"
        if candidate.longer_share
        else "none"
    )
    mark = "  <- recommended" if candidate.recommended else ""
    return (
        f"{name:>10}  {candidate.max_norm:>10.6g}  {percent(candidate.share):>18}  {longer:>25}"
        f"{mark}"
    )
