"""Logs for the commands, written by a real clipper from gradients of given norms."""

import json
import math

import numpy as np
import torch
from torch import nn

import distclip
from distclip.cli.log_reader import read_runs

SPIKES, BAD = {90: 20.0, 91: 45.0, 250: 30.0}, (40, 41, 180)  # positions count from 0, steps from 1


def write_log(
    path, norms, policy=None, names=("w",), every=1, direction=(0.5, 0.5, 0.5, 0.5), **options
):
    """One step for each norm; each parameter gets norm / sqrt(parameters) times a unit vector."""
    params = [(name, nn.Parameter(torch.zeros(4))) for name in names]
    clipper = distclip.GradClipper(
        params,
        policy=policy or distclip.FixedNorm(1.0),
        sinks=[distclip.JSONLSink(path, groups_every=every)],
        **options,
    )
    unit = torch.tensor(direction) / math.sqrt(len(params))
    for norm in norms:
        for _, p in params:
            p.grad = unit * norm
        clipper.clip_()
    return path


def spiky_norms(steps=300, seed=0):
    """Around 0.7, three spikes, three steps with NaN."""
    norms = 0.7 + 0.25 * np.random.default_rng(seed).standard_normal(steps).clip(-2, 2)
    for at, norm in SPIKES.items():
        norms[at] = norm
    norms[list(BAD)] = math.nan
    return norms


def rows_of(path):
    """Those of a log's steps."""
    rows = map(json.loads, path.read_text().splitlines())
    return [row for row in rows if "distclip_log" not in row]


def rewritten(path, change):
    """The same log with other fields: `change(row)` returns them."""
    path.write_text("".join(json.dumps(change(row)) + "\n" for row in rows_of(path)))
    return path


HEADER = {
    "distclip_log": 2, "date": "2026-11-26T21:00:00+00:00", "run": None, "policy": "FixedNorm(1.0)",
    "groups": ["all"], "norm_type": 2.0, "world_size": 4, "on_nonfinite": "skip", "layers": [],
    "plan": [{"parameters": 12, "elements": 34567, "description": "replicated", "ranks": [0, 1, 2, 3], "copies": 4}],
    "versions": {"distclip": "0.1.0", "torch": "2.13.0", "python": "3.11.7"}, "launcher": "torchrun", "device": "cpu",
}  # fmt: skip


def made_line(step, norm, threshold=1.0, **fields):
    """A step's line of schema 2 as JSONLSink would write it, without a clipper."""
    finite = math.isfinite(norm)
    skipped = fields.get("skipped", not finite)
    coef = 0.0 if skipped else min(1.0, threshold / norm) if norm > 0 else 1.0
    line = {
        "step": step, "total_norm": norm, "norm_after": 0.0 if finite and skipped else norm * coef if finite else norm,
        "clipped": bool(finite and norm > threshold), "skipped": skipped, "nonfinite": 0 if finite else 1,
        "coefs": [coef], "threshold": [threshold], "group_norms": [norm], "cosine": [1.0], "clip_rate": 0.25, "skips": 0,
        "layer_norms": [], "clip_coef": coef, "groups": ["all"], "layers": [], "norm_type": 2.0, "culprits": [],
        "matters": None, "deviation": None, "notes": [], "rank_norms": [], "outlier_rank": None, "rank_deviation": None,
        "action": "none",
    }  # fmt: skip
    return line | fields


def write_lines(path, lines, header=None):
    """`header`: changes to HEADER; None: a log without one, as before schema 2."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        if header is not None:
            file.write(json.dumps(HEADER | header) + "\n")
        for line in lines:
            file.write(json.dumps(_null_for_nonfinite(line), allow_nan=False) + "\n")
    return path


def _null_for_nonfinite(value):
    if isinstance(value, dict):
        return {k: _null_for_nonfinite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_null_for_nonfinite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path):
    """Of the one log there."""
    (run,), left_out = read_runs([str(path)])
    assert left_out == []
    return run
