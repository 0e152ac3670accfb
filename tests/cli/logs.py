"""Logs for the commands, written by a real clipper from gradients of given norms."""

import json
import math

import numpy as np
import torch
from torch import nn

import distclip

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
