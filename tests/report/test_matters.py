"""Which steps matter: by an oracle in numpy; what is kept of them; alike on all ranks, one call
late too."""

import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
import skips
from distclip.decide.matters import NormWindow
from distclip.testing import count_collectives, fully_shard
from late import judged_late
from parity.layouts import Pair, mesh, pair_grads, trained
from parity.oracle import total_norm

NAN, INF = math.nan, math.inf


def oracle(norms, skipped):
    """The rule, worked out from the whole run: (matters, deviation) of each step."""
    out, logs, seen, fit, marks, refresh = [], [], [], None, [], 16
    for step, (norm, left_out) in enumerate(zip(norms, skipped)):
        deviation, is_largest = None, False
        if math.isfinite(norm) and norm > 0:
            if fit is not None:
                deviation = (math.log(norm) - fit[0]) / fit[1]
            is_largest = norm > np.sort([0.0] * 10 + seen)[-10]
            seen.append(norm)
            if not left_out:
                logs.append(math.log(norm))
                if len(logs) == refresh:
                    refresh += min(len(logs), 128) // 8
                    last = np.array(logs[-128:])
                    apart = np.median(np.abs(last - np.median(last)))
                    fit = np.median(last), max(1.4826 * apart, 0.025)
        matters = None
        if left_out:
            matters = "skipped"
        elif not math.isfinite(norm) or (deviation is not None and abs(deviation) > 4):
            matters = "outlier"
        elif is_largest and deviation is not None and sum(m > step - 128 for m in marks) < 32:
            matters = "largest"
            marks.append(step)
        out.append((matters, deviation))
    return out


def drawn_run(name):
    draw = np.random.default_rng(5)
    steps = np.arange(600)
    norms = np.exp(0.2 * draw.standard_normal(600))
    if name == "spikes":
        norms[[3, 50, 300, 301]] *= 8
        norms[400] /= 50
        norms[[120, 350]] = NAN
        norms[351] = INF
        norms[[352, 353]] = 0
    elif name == "grows":
        norms = np.exp(steps / 200) * np.exp(0.001 * draw.standard_normal(600))
    elif name == "shifts":
        norms[200:] *= 5
    elif name == "constant":
        norms = np.full(600, 2.0)
        norms[[100, 200]] = 2.0 * 1.09, 2.0 * 1.12
    skipped = ~np.isfinite(norms) | (norms > 40)
    skipped[351] = False  # let through
    return norms.tolist(), skipped.tolist()


@pytest.mark.parametrize("name", ["spikes", "grows", "shifts", "constant", "noise"])
def test_the_window_does_what_the_rule_says(name):
    norms, skipped = drawn_run(name)
    window, wanted = NormWindow(), oracle(norms, skipped)
    judged = [window.judge(norm, left_out) for norm, left_out in zip(norms, skipped)]
    assert [matters for matters, _ in judged] == [matters for matters, _ in wanted]
    for (_, deviation), (_, same) in zip(judged, wanted):
        assert (deviation is None) == (same is None) and (
            same is None or deviation == pytest.approx(same)
        )
    kinds = [matters for matters, _ in judged]
    assert not any(kinds[:16]), "too few to tell"
    if name == "spikes":
        assert [kinds[i] for i in (3, 50, 120, 300, 350, 351, 352, 400)] == [
            *(None, "outlier", "skipped", "outlier", "skipped", "outlier", None, "outlier"),
        ]
        assert judged[400][1] < -4 and judged[352][1] is None
    elif name == "grows":
        assert 100 < kinds.count("largest") <= 32 * 5, "each step is one, and a quarter is kept"
        assert "outlier" not in kinds
    elif name == "shifts":
        assert kinds[200] == "outlier" and set(kinds[400:]) <= {None, "largest", "outlier"}
        assert kinds[400:].count("outlier") < 5, "the new level is the usual one"
    elif name == "constant":
        assert [i for i, kind in enumerate(kinds) if kind == "outlier"] == [200], "a tenth is none"
    else:
        assert 3 < kinds.count("largest") < 60 and kinds.count("outlier") < 6


# In a clipper


def stepping(clipper, params, norms):
    """One step for each norm, of equal entries; the reports."""
    reports = []
    count = sum(p.numel() for p in params)
    for norm in norms:
        for p in params:
            p.grad = torch.full_like(p, norm / math.sqrt(count))
        reports.append(clipper.clip_())
    return reports


def pair(*names):
    return [(name, nn.Parameter(torch.zeros(2))) for name in names]


QUIET = [1.0, 1.1, 0.9, 1.05] * 6


def test_layers_are_there_at_the_interval_and_where_it_matters(tmp_path):
    named = pair("a.w", "b.w")
    path = tmp_path / "log.jsonl"
    clipper = distclip.GradClipper(
        named,
        5.0,
        watch=distclip.Watch(distclip.per_layer()),
        sinks=[distclip.JSONLSink(path)],
    )
    params = [p for _, p in named]
    reports = stepping(clipper, params, QUIET[:22])
    named[1][1].grad = torch.tensor([30.0, 40.0])
    reports.append(clipper.clip_())
    reports += stepping(clipper, params, [NAN, 1.0])
    _, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    with_layers = [row["step"] for row in rows if row["layers"]]
    assert {10, 20, 23, 24} <= set(with_layers), "each tenth, the outlier and the skipped one"
    assert [row["step"] for row in rows if row["layers"]] == [
        row["step"] for row in rows if row["matters"] or row["step"] % 10 == 0
    ]
    spike = rows[22]
    assert spike["matters"] == "outlier" and spike["deviation"] > 4
    assert spike["layers"] == ["a", "b"] and spike["layer_norms"][1] == 50.0
    assert rows[23]["matters"] == "skipped" and rows[23]["deviation"] is None
    for report, row in zip(reports, rows, strict=True):
        assert (report.matters, report.deviation) == (row["matters"], row["deviation"])
        assert report.layers == ("a", "b") and row["layers"] in ([], ["a", "b"])
        assert row["layer_norms"] == report.layer_norms.tolist()[: len(row["layers"])] or (
            row["step"] == 24
        )
    fresh = distclip.GradClipper(named, 5.0)
    fresh.load_state_dict(clipper.state_dict())
    assert stepping(fresh, params, [50.0])[0].matters is None, "the window begins anew"


def spiking(late):
    """The second layer is 1,000 times as large at step 21."""
    model, written = Pair(), []
    fully_shard(model.first, mesh=mesh(4))
    fully_shard(model, mesh=mesh(4))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-9, fused=True)
    watch = distclip.Watch(distclip.per_layer(), every=100)
    clipper = judged_late(
        distclip.GradClipper(model, INF, watch=watch, sinks=[written.append]), late
    )
    draw = torch.Generator().manual_seed(1)
    names, told, wanted = [], [], None
    for step in range(1, 25):
        size = 1 + 0.2 * torch.rand((), generator=draw).item()
        optimizer.zero_grad()
        trained(model)
        for name, p in model.named_parameters():
            spike = 1000 if step == 21 and name.startswith("second") else 1
            p.grad.to_local().mul_(size * spike)
        if step == 21:
            halves = pair_grads()[:3], [1000 * grad for grad in pair_grads()[3:]]
            wanted = [size * total_norm(half, 2.0) for half in halves]
        with count_collectives() as seen:
            report = clipper.step(optimizer)
        names.append(seen.names)
        told.append((report.matters, report.deviation))
    clipper._writer.flush()
    rows = [(r.step, r.matters, r.deviation, r.layers, r.layer_norms.tolist()) for r in written]
    return names, told, rows, wanted


@pytest.mark.parametrize("late", [False, True])
def test_the_layer_of_a_spike_is_found_on_all_ranks_alike(ranks, late):
    said = ranks.run(spiking, late)
    _, _, rows, wanted = said[0]
    for names, told, mine, _ in said:
        assert names == [["allreduce_"]] * 24, "no message more, at a step that matters either"
        assert told == said[0][1] and bool(mine) == (mine is rows)
    assert [row[0] for row in rows] == list(range(1, 25))
    step, matters, deviation, layers, norms = rows[20]
    assert (step, matters, layers) == (21, "outlier", ("first", "second")) and deviation > 20
    assert norms == pytest.approx(wanted, rel=1e-6)
    others = [row for row in rows if row[1] is None]
    assert len(others) > 12 and not any(row[3] for row in others), "no layers where nothing is"
    told = said[0][1]
    if late:
        assert told == [(None, None)] * 24, "not known yet"
    else:
        assert told == [row[1:3] for row in rows]


def test_late_and_at_once_are_the_same(tmp_path):
    rows = {}
    for late in (False, True):
        named = pair("a.w", "b.w")
        path = tmp_path / f"{late}.jsonl"
        clipper = judged_late(
            distclip.GradClipper(
                named,
                INF,
                on_nonfinite="propagate",
                watch=distclip.Watch(distclip.per_layer(), every=8),
                sinks=[distclip.JSONLSink(path)],
            ),
            late,
        )
        params = [p for _, p in named]
        stepping(clipper, params, [*QUIET, 40.0])
        clipper.measure()
        stepping(clipper, params, [1.0, INF, 1.0, 60.0])
        del clipper  # the last step is judged by the window alone
        rows[late] = [json.loads(line) for line in path.read_text().splitlines()][1:]
    assert rows[True] == rows[False]
    assert [row["step"] for row in rows[True]] == [*range(1, 26), *range(27, 31)]
    kinds = {row["step"]: row["matters"] for row in rows[True]}
    assert [kinds[step] for step in (25, 28, 30)] == ["outlier"] * 3
    assert rows[True][-1]["layers"] == ["a", "b"] and rows[True][-2]["layers"] == []
    assert rows[True][-3]["culprits"][0]["parameter"] == "a.w", "after a measure() between them too"


@pytest.mark.parametrize("p, most", [(2.0, "b: 100 % of its power"), (INF, "b")])
def test_the_console_says_where_an_outlier_is(caplog, p, most):
    named = pair("a.w", "b.w")
    watch = distclip.Watch(distclip.per_layer(), every=100)
    clipper = distclip.GradClipper(
        named, INF, norm_type=p, watch=watch, sinks=[distclip.LoggingSink(every=100)]
    )
    caplog.set_level("INFO", logger="distclip")
    stepping(clipper, [p for _, p in named], QUIET)
    caplog.clear()
    named[1][1].grad = torch.tensor([0.0, 50.0])
    named[0][1].grad.zero_()
    report = clipper.clip_()
    assert caplog.messages == [
        f"step 25: norm 50, coefficient 1, {report.deviation:+.1f} robust deviations from the steps "
        f"before, most of it in {most}"
    ]
    assert report.layer_shares[1] > 0.99


# Culprits' neighbours


@skips.told()
def poisoned(bad, absent):
    """Gradients of rank 2 alone."""
    named = [(f"w{i}", nn.Parameter(torch.zeros(3))) for i in range(6)]
    clipper = distclip.GradClipper(named, 1.0, replicated_over={"*": distclip.PRIVATE})
    for i, (_, p) in enumerate(named):
        p.grad = torch.ones(3)
        if dist.get_rank() == 2:
            p.grad = None if i in absent else p.grad
            if i in bad:
                p.grad[1] = NAN
    return [culprit._asdict() for culprit in clipper.clip_().culprits]


@pytest.mark.parametrize(
    "bad, absent, around",
    [
        ([2], [], {"w2": ("w1", "w3")}),
        ([2, 3], [], {"w2": ("w1", "w4"), "w3": ("w1", "w4")}),
        ([0, 5], [1, 4], {"w0": (None, "w2"), "w5": ("w3", None)}),
        ([0, 1, 2, 3, 4, 5], [], {f"w{i}": (None, None) for i in range(6)}),
    ],
)
def test_finite_neighbours_bracket_the_layer(ranks, bad, absent, around):
    said = ranks.run(poisoned, bad, absent)
    assert said == [said[0]] * 4
    assert {c["parameter"]: (c["before"], c["after"]) for c in said[0]} == around
    assert all(c["rank"] == 2 and c["kind"] == "NaN" for c in said[0])
