"""Columns over the steps of a log: every field, resumed, repeated and old steps, shares of layers."""

import json
import math

import numpy as np
import pytest

from cli.logs import (
    BAD,
    HEADER,
    SPIKES,
    made_line,
    read,
    rewritten,
    rows_of,
    spiky_norms,
    write_lines,
    write_log,
)
from distclip.cli.log_header import PlanRow
from distclip.cli.log_reader import RunError, read_runs
from distclip.cli.part_shares import power_shares
from distclip.cli.run_log import ACTIONS, LoggedCulprit, RankNote


@pytest.fixture(scope="module")
def spiky(tmp_path_factory):
    return write_log(tmp_path_factory.mktemp("logs") / "spiky.jsonl", spiky_norms())


def test_columns_are_those_that_a_clipper_wrote(spiky):
    run, rows = read(spiky), rows_of(spiky)
    rows = [row for row in rows if "step" in row]

    def of(name):
        return np.array([math.nan if row[name] is None else row[name] for row in rows], float)

    assert len(run) == len(rows) == 300 and run.step.tolist() == [row["step"] for row in rows]
    np.testing.assert_array_equal(run.norm, of("total_norm"))
    np.testing.assert_array_equal(run.after, of("norm_after"))
    np.testing.assert_array_equal(run.clip_rate, of("clip_rate"))
    np.testing.assert_array_equal(run.nonfinite, of("nonfinite"))
    np.testing.assert_array_equal(run.coef, [row["coefs"][0] for row in rows])
    assert set(run.threshold.tolist()) == {1.0} and run.limits == (1.0,) and run.norm_type == 2
    assert run.step[run.norm > 10].tolist() == [at + 1 for at in SPIKES], "not vacuous"
    assert run.step[run.skipped].tolist() == [at + 1 for at in BAD]
    assert (run.skipped == ~run.finite).all() and run.clipped.sum() == sum(
        row["clipped"] for row in rows
    )
    with pytest.raises(RunError):
        read_runs([str(spiky.with_name("none"))])


def test_what_schema_2_adds(tmp_path):
    norms = [[3.0, 4.0], [None, 1.0]]
    lines = [
        made_line(1, 5.0, layers=["a", "b"], layer_norms=norms[0], deviation=4.5, matters="outlier", action="lower_lr",
                  notes=[{"rank": 2, "step": 1, "note": {"ids": [7]}, "cut": True}], rank_norms=[1.0, None, 9.0],
                  outlier_rank=2, rank_deviation=12.5),
        made_line(2, math.nan, layers=["a", "b"], layer_norms=norms[1],
                  culprits=[{"parameter": "a.w", "rank": 1, "kind": "inf", "before": None, "after": "b.w"}]),
        made_line(3, 1.0),
    ]  # fmt: skip
    log = write_lines(tmp_path / "run.jsonl", lines, {"run": "my run", "layers": ["a", "b"]})
    run = read(log)
    assert run.name == "my run" and run.notes == () and len(run.headers) == 1
    header = run.headers[0]
    assert (header.policy, header.world_size, header.launcher, header.layers) == ("FixedNorm(1.0)", 4, "torchrun", ("a", "b"))  # fmt: skip
    assert header.plan == (PlanRow(12, 34567, "replicated", (0, 1, 2, 3), 4),)
    assert dict(header.versions) == HEADER["versions"] and header.date == HEADER["date"]
    np.testing.assert_array_equal(run.deviation, [4.5, np.nan, np.nan])
    assert run.outlier_rank.tolist() == [2, -1, -1] and run.rank_deviation[0] == 12.5
    assert [ACTIONS[a] for a in run.action] == ["lower_lr", "none", "none"]
    assert [run.part_names[i] if i >= 0 else None for i in run.top] == ["b", "a", None]
    np.testing.assert_allclose(run.top_share, [16 / 25, np.inf, np.nan])
    details = run.details_of(0)
    assert details.notes == (RankNote(2, 1, {"ids": [7]}, True),)
    np.testing.assert_array_equal(details.rank_norms, [1.0, np.nan, 9.0])
    assert run.details_of(1).culprits == (LoggedCulprit("a.w", 1, "inf", None, "b.w"),)
    assert str(run.details_of(1).culprits[0]) == "a.w on rank 1: inf (finite: b.w after)"
    (parts,) = run.parts
    assert parts.kind == "layer" and parts.names == ("a", "b") and parts.first.tolist() == [1, 2]
    np.testing.assert_allclose(parts.shares, [[9 / 25, 16 / 25], [np.inf, np.nan]], rtol=1e-6)
    np.testing.assert_allclose(parts.mean, [9 / 25, 16 / 25])
    assert parts.largest.tolist() == [math.inf, pytest.approx(16 / 25)]


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5, math.inf])
def test_shares_are_those_of_numpy(p):
    norms = np.abs(np.random.default_rng(0).standard_normal((20, 5))) * 1e180
    norms[3] = 0
    norms[4, 2] = np.nan
    shares = power_shares(norms, p)
    for i in range(20):
        if i == 4:
            np.testing.assert_array_equal(shares[4], [np.nan, np.nan, np.inf, np.nan, np.nan])
            continue
        relative = norms[i] / max(norms[i].max(), 1)
        exact = relative if math.isinf(p) else relative**p / max((relative**p).sum(), 1e-300)
        np.testing.assert_allclose(shares[i], exact, rtol=1e-12)


def test_many_layers_are_merged_by_maximum_and_no_step_is_lost(tmp_path):
    """More shares than are kept: entries cover several steps, and the one that a layer dominates
    shows it."""
    names, steps = [f"l{i}" for i in range(2000)], 2300
    small = json.dumps({"layers": names, "layer_norms": [0.5] * 2000})[1:]
    large = json.dumps({"layers": names, "layer_norms": [0.5] * 777 + [5000.0] + [0.5] * 1222})[1:]
    log = tmp_path / "run.jsonl"
    with log.open("w") as file:
        for step in range(1, steps + 1):
            file.write(f'{{"step": {step}, "total_norm": 1.0, {large if step == 1234 else small}\n')
    run = read(log)
    (parts,) = run.parts
    assert parts.shares.size <= 4_000_000 and len(parts.first) < steps, "vacuous"
    assert (
        (parts.first[1:] > parts.last[:-1]).all()
        and parts.first[0] == 1
        and parts.last[-1] == steps
    )
    at = int(np.flatnonzero((parts.first <= 1234) & (parts.last >= 1234))[0])
    assert parts.shares[at, 777] > 0.99 and parts.largest[777] > 0.99
    assert (np.delete(parts.shares[:, 777], at) < 0.01).all()
    assert run.part_names[run.top[1233]] == "l777" and run.top_share[1233] > 0.99
    np.testing.assert_allclose(parts.mean.sum(), 1, rtol=1e-6)


def test_of_a_resumed_run_the_later_layers_count(tmp_path):
    def line(step, norms):
        return made_line(step, 1.0, layers=["a", "b"], layer_norms=norms)

    lines = [line(step, [3.0, 4.0]) for step in range(1, 11)]
    lines += [line(step, [4.0, 3.0]) for step in range(6, 9)]
    run = read(write_lines(tmp_path / "run.jsonl", lines, {}))
    (parts,) = run.parts
    assert parts.first.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    np.testing.assert_allclose(parts.shares[:, 0], [0.36] * 5 + [0.64] * 3, rtol=1e-6)
    assert "".join(run.part_names[i] for i in run.top) == "bbbbbaaabb"


def test_the_rolling_rate_of_old_logs(tmp_path):
    norms = np.random.default_rng(3).lognormal(0, 0.5, 700)
    log = rewritten(
        write_log(tmp_path / "run.jsonl", norms),
        lambda row: {k: v for k, v in row.items() if k != "clip_rate"},
    )
    (one,), _ = read_runs([str(log)])
    clipped = np.array([row["clipped"] for row in rows_of(log)])
    expected = [clipped[max(0, i - 499) : i + 1].mean() for i in range(700)]
    assert 0.1 < clipped.mean() < 0.9
    np.testing.assert_allclose(one.clip_rate, expected, rtol=1e-12)


def test_of_repeated_steps_the_later_line_counts(tmp_path, capsys):
    log = write_log(tmp_path / "run.jsonl", [2.0] * 20)
    text = log.read_text()
    log.write_text(
        text + "".join(json.dumps(row | {"total_norm": 3.0}) + "\n" for row in rows_of(log)[14:])
    )
    (one,), _ = read_runs([str(log)])
    assert one.norm.tolist() == [2.0] * 14 + [3.0] * 6
    assert one.notes == (
        f"{log}: 6 steps are there more than once (a run that was resumed?); the later line counts",
    )
    log.write_text(text + text.splitlines()[4] + "\n")
    (two,), _ = read_runs([str(log)])
    assert two.notes[1] == (
        f"{log}: its last line is step 4, yet step 20 stands before it; were "
        f"two runs written to one file?"
    )
