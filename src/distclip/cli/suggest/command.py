"""`distclip suggest RUN...`: how often each max_norm would have clipped, and a recommendation."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from distclip.cli.run_log import RunError, RunLog, read_runs
from distclip.cli.suggest.thresholds import (
    Candidate,
    find_candidates,
    find_warnings,
    recommend_max_norm,
)


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
    return {
        "run": one.path,
        "steps": len(one.step),
        "not_finite": int((~one.finite).sum()),
        "skipped": int(one.skipped.sum()),
        "clipped_share": float(one.clipped.double().mean()),
        "candidates": [vars(candidate) for candidate in find_candidates(one)],
        "recommendation": vars(recommend_max_norm(one)),
        "warnings": list(find_warnings(one)),
        "notes": list(one.notes),
    }


def _plain_text(one: RunLog) -> str:
    steps = "1 step" if len(one.step) == 1 else f"{len(one.step)} steps"
    lines = [
        f"{one.path}: {steps}, {float(one.clipped.double().mean()):.1%} clipped; norms before "
        f"clipping",
        "",
    ]
    lines += [
        f"{'percentile':>10}  {'max_norm':>10}  would have clipped",
        *map(_candidate_row, find_candidates(one)),
        "",
    ]
    advice = recommend_max_norm(one)
    lines.append(f"recommendation: {advice.setting}, {advice.reason}")
    lines += [f"warning: {text}" for text in find_warnings(one)]
    lines += [f"note: {text}" for text in one.notes]
    return "\n".join(lines)


def _candidate_row(candidate: Candidate) -> str:
    name = "max" if candidate.percentile == 100 else f"{candidate.percentile:g}"
    return f"{name:>10}  {candidate.max_norm:>10.4g}  {candidate.share:>18.1%}"
