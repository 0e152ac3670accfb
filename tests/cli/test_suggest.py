"""Runs of stated truth: what is said of each, and what is recommended; shares against NumPy."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest

import distclip
from cli.logs import BAD, made_line, rewritten, rows_of, spiky_norms, write_lines, write_log
from distclip.cli import main
from distclip.cli.norm_history import running_median
from distclip.cli.suggest.advice import percent, times

PERCENTILES = [50, 75, 90, 95, 99, 99.9, 100]


def suggested(capsys, *arguments):
    assert main(["suggest", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)["runs"]


def noisy(level=1.0, steps=3000, sigma=0.2, seed=0):
    """Log-normal around `level`, a number or one a step."""
    return np.exp(sigma * np.random.default_rng(seed).standard_normal(steps)) * level


def at(norms, **changes):
    """`s100=5.0`: step 100 has norm 5."""
    norms = norms.copy()
    for step, norm in changes.items():
        norms[int(step[1:]) - 1] = norm
    return norms


def every(norms, steps, norm, jitter=0):
    """A spike at every `steps`-th step."""
    norms, shake = norms.copy(), np.random.default_rng(7)
    for step in range(steps, len(norms), steps):
        norms[step + int(shake.integers(-jitter, jitter + 1))] = norm
    return norms


def among(norms, number, norm):
    """Spikes at steps drawn by lot."""
    norms = norms.copy()
    norms[np.random.default_rng(3).choice(len(norms), number, replace=False)] = norm
    return norms


def percentile(norms, q=95):
    return float(np.percentile(norms[np.isfinite(norms)], q))


@dataclass
class Truth:
    """What a run is, which findings it deserves, in this order, with words of the first or of each;
    and the range of the recommended max_norm (None: no advice)."""

    norms: np.ndarray
    kinds: list
    words: list
    advice: tuple | None
    reason: str = ""
    threshold: float = math.inf
    skipped: tuple = ()  # positions that the policy leaves out


T = np.arange(3000)
P95 = percentile(noisy())
BELOW_88 = percentile(noisy(), 12)
HALF_BAD = np.where(np.random.default_rng(1).random(3000) < 0.5, np.nan, noisy())
START = np.where(T < 14, np.nan, noisy())
SHOCK = noisy(np.where((T >= 1000) & (T < 1400), 20.0, 1.0))
WAVE = noisy(np.exp(np.sin(2 * np.pi * T / 1000)))
TRUTHS = {
    "steady, measured": Truth(noisy(), [], [], (0.97 * P95, 1.03 * P95), "the 95th percentile: ordinary steps pass, 4.3 %"),
    "steady, clipped at few steps": Truth(noisy(), [], [], (0.97 * P95, 1.03 * P95), "the 95th percentile", threshold=1.35),
    "one spike that the run got over": Truth(
        at(noisy(steps=5000, sigma=0.01), s2500=3300.0), ["spikes"],
        ["one spike, 3,300 times the running median, at step 2,500; median norm 1 before the largest, 1 after it: the run went on as before"],
        (1.0, 1.1), "the 95th percentile",
    ),
    "a jump to another level": Truth(
        noisy(np.where(T < 1200, 1.0, 40.0)), ["diverged"], ["the run diverged at step 1,201: the median norm was", "39 from there on"],
        (0.95 * P95, 1.05 * P95), "the 95th percentile of the steps before it was lost",
    ),
    "not finite to the end": Truth(
        np.where(T < 2000, noisy(), np.nan), ["skipped", "diverged"], ["1,000 of 3,000 steps (33 %) were skipped", "diverged at step 2,001: no norm is finite from there on"],
        None, "33 % of the steps were skipped",
    ),
    "a shock that passes": Truth(SHOCK, ["trend"], ["the median norm rises from 0.98 to 20 by step 1,250, then falls to 0.96"], (1.2, 1.6)),
    "half of the steps skipped": Truth(
        HALF_BAD, ["skipped"], ["steps (51 %) were skipped", "with gradients that were not finite. No threshold cures that: find their cause first"],
        None, "51 % of the steps were skipped; find out why first",
    ),
    "one step in fifty left out": Truth(
        noisy(), ["skipped"], ["60 of 3,000 steps (2.0 %) were skipped: 60 by the policy. No threshold cures that"],
        (0.95 * P95, 1.05 * P95), "the 95th percentile", threshold=1.35, skipped=tuple(range(25, 3000, 50)),
    ),
    "a loss scale at its start": Truth(
        START, ["skipped"], ["all within the first 14, as where a loss scale finds its size"], (0.97 * P95, 1.03 * P95), "the 95th percentile",
    ),
    "88 % clipped": Truth(
        noisy(), ["rate"], ["the run was clipped at 88 % of the steps"], (BELOW_88, BELOW_88),
        "what it had: its threshold was a part of the learning rate. A higher one, such as 1.4 (the 95th percentile), lengthens 88 % of the steps by 1.3 times",
        threshold=BELOW_88,
    ),
    "all clipped, at a twentieth": Truth(
        noisy(), ["rate"], ["the run was clipped at 100 % of the steps"], (0.05, 0.05),
        "A higher one, such as 1.4 (the 95th percentile), lengthens 100 % of the steps by 20 times; lower the learning rate by as much", threshold=0.05,
    ),
    "never clipped": Truth(noisy(), ["rate"], ["never clipped: its threshold of 50 was above every norm"], (0.97 * P95, 1.03 * P95), threshold=50.0),
    "falling": Truth(
        noisy(np.exp(-T / 1500)), ["trend"], ["the median norm falls from 0.9", "look at AutoClip, ZClip or Scheduled"],
        (0.2, 0.35), "of the last third of the run, since the norm drifts",
    ),
    "rising": Truth(noisy(1 + 4 * T / 3000), ["trend"], ["the median norm rises from 1.2 to 4.8"], (5, 7), "of the last third"),
    "U-shaped": Truth(noisy(np.exp(2 * np.abs(T / 1500 - 1))), ["trend"], ["falls from 6.", "by step 1,750, then rises to 6."], (5, 10)),
    "hump": Truth(noisy(np.exp(2 - 2 * np.abs(T / 1500 - 1))), ["trend"], ["rises from 1.", "then falls to 1."], (1.5, 5)),
    "waves": Truth(WAVE, ["trend"], ["goes up and down between 0.", "(4 turns)"], (0.8, 4.5)),
    "settles": Truth(
        noisy(1 + 9 * np.exp(-T / 60)), ["trend"], ["keeps to", "from step 501 on"], (0.97 * P95, 1.05 * P95), "of the steps after it settled",
    ),
    "periodic spikes": Truth(
        every(noisy(), 250, 30.0, jitter=1), ["period", "spikes"], ["spikes come back every 250 steps", "11 steps have norms above 5 times"],
        (0.97 * P95, 1.05 * P95),
    ),
    "spikes by lot": Truth(among(noisy(), 12, 30.0), ["spikes"], ["12 steps have norms above 5 times the running median"], (0.97 * P95, 1.05 * P95)),
    "spikes at one step in eight": Truth(every(noisy(), 8, 100.0), ["spikes"], ["374 steps have norms above"], (0.95 * P95, 1.05 * P95)),
    "broad noise": Truth(noisy(sigma=0.8), [], [], (3.3, 4.2), "the 95th percentile"),
    "too few": Truth(noisy(steps=40), ["few"], ["only 40 steps: percentiles say little; log at least 100"], None, "40 steps with a finite norm are too few"),
    "one step": Truth(np.ones(1), ["few"], ["only 1 step:"], None, "too few"),
    "mostly zeros": Truth(np.where(T % 3 == 0, 1.0, 0.0), [], [], None, "at least half of the norms are 0"),
    "a blow-up that kills": Truth(
        at(noisy(np.where(T < 1500, 1.0, 0.004)), s1500=1e9), ["diverged", "spikes"],
        ["step 1,500 had 1.7e+09 times the running median and nothing clipped it", "the median norm was 1 before and 0.0041 after it: the model may be dead since"],
        (0.95 * P95, 1.05 * P95), "the 95th percentile of the steps before it was lost",
    ),
    # of a model that learns quickly: large norms at the start are no spikes, and a threshold of the end would throttle a new run
    "a steep fall from the start": Truth(
        noisy(0.01 + np.exp(-T[:200] / 12), 200), ["trend"], ["the median norm falls from "], (0.012, 0.016),
        "where this run goes on take it, for one that begins anew 0.4",
    ),
    "short, and thrown out at a quarter": Truth(
        at(noisy(np.where(T[:200] < 49, 0.3, 9.0), 200), s50=400.0), ["diverged", "spikes"], ["the run diverged at step 50: the median norm was 0.31", "one spike"],
        None, "49 steps with a finite norm, before the run was lost, are too few",
    ),
    "a blow-up at the start": Truth(
        at(noisy(np.where(T < 2, 9.0, 0.1)), s2=1e13), ["diverged", "spikes"], ["step 2 had 8.8e+13 times", "there are next to no steps before it"],
        None, "1 step with a finite norm, before the run was lost, are too few",
    ),
}  # fmt: skip


def log_of(truth, path):
    lines = []
    for i, norm in enumerate(truth.norms.tolist()):
        fields = {"skipped": True} if i in truth.skipped else {}
        lines.append(made_line(i + 1, norm, truth.threshold, **fields))
    return write_lines(path, lines, {})


@pytest.mark.parametrize("truth", TRUTHS.values(), ids=TRUTHS)
def test_what_is_said_of_a_run_whose_truth_is_known(truth, tmp_path, capsys):
    (run,) = suggested(capsys, log_of(truth, tmp_path / "run.jsonl"))
    assert [finding["kind"] for finding in run["findings"]] == truth.kinds, run["warnings"]
    assert run["warnings"] == [finding["text"] for finding in run["findings"]]
    for words in truth.words:
        assert any(words in text for text in run["warnings"]), run["warnings"]
    advice = run["recommendation"]
    assert truth.reason in advice["reason"]
    marked = [row for row in run["candidates"] if row["recommended"]]
    if truth.advice is None:
        assert advice["max_norm"] is None and marked == []
        return
    low, high = truth.advice
    assert low <= advice["max_norm"] <= high
    assert marked and {row["max_norm"] for row in marked} == {advice["max_norm"]}, (
        "it stands in its table"
    )
    had = {truth.threshold}
    assert all(
        float(f"{row['max_norm']:.2g}") == row["max_norm"] or row["max_norm"] in had
        for row in run["candidates"]
    ), "two digits"
    bounds = [row["max_norm"] for row in run["candidates"]]
    assert bounds == sorted(bounds)


def test_there_are_twenty():
    assert len(TRUTHS) >= 20


def test_no_cliff_where_more_and_more_steps_were_clipped(tmp_path, capsys):
    advice = []
    for share in range(0, 100, 5):
        bound = percentile(noisy(steps=1000), 100 - share) if share else 2.0
        truth = Truth(noisy(steps=1000), [], [], None, threshold=round(bound, 4))
        (run,) = suggested(capsys, log_of(truth, tmp_path / f"{share}.jsonl"))
        advice.append((bound, run["recommendation"]["max_norm"]))
    for (had, bound), (next_had, next_bound) in pairwise(advice):
        assert 0.75 < next_bound / bound < 1.1, (had, bound, next_had, next_bound)
    assert advice[0][1] == pytest.approx(percentile(noisy(steps=1000)), rel=0.04)
    assert advice[-1][1] == pytest.approx(advice[-1][0], rel=1e-3), "in the end what it had"


def test_how_many_steps_a_bound_lengthens_is_counted(tmp_path, capsys):
    norms = noisy()
    log = log_of(Truth(norms, [], [], None, threshold=0.8), tmp_path / "run.jsonl")
    (run,) = suggested(capsys, log)
    length = np.minimum(norms, 0.8)
    for row in run["candidates"]:
        grown = np.minimum(norms, row["max_norm"]) / length
        assert row["longer_share"] == pytest.approx((grown > 1.001).mean())
        if row["longer_share"]:
            assert row["longer_factor"] == pytest.approx(np.median(grown[grown > 1.001]))
    assert run["candidates"][-1]["longer_share"] > 0.8 > run["candidates"][0]["longer_factor"] - 1


def test_shares_are_those_of_numpy(tmp_path, capsys):
    log = write_log(tmp_path / "run.jsonl", spiky_norms())
    norms = np.array([row["total_norm"] for row in rows_of(log) if row["total_norm"] is not None])
    assert len(norms) == 300 - len(BAD)
    (run,) = suggested(capsys, log)
    assert run["steps"] == 300 and run["not_finite"] == run["skipped"] == len(BAD)
    assert run["clipped_share"] == pytest.approx((norms > 1).sum() / 300)
    assert {c["percentile"] for c in run["candidates"]} >= set(PERCENTILES)
    for candidate in run["candidates"]:
        exact, bound = np.percentile(norms, candidate["percentile"]), candidate["max_norm"]
        assert bound == pytest.approx(exact, rel=0.06) and float(f"{bound:.2g}") == bound
        assert candidate["share"] == (norms > bound).mean(), "the share of the number as printed"
    assert run["candidates"][-1]["share"] == 0 < run["candidates"][-2]["share"]


def test_the_command_prints_a_table_a_recommendation_and_warnings(tmp_path):
    logs = [
        write_log(tmp_path / f"{name}.jsonl", spiky_norms(seed=seed))
        for seed, name in enumerate("ab")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "distclip", "suggest", *map(str, logs)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    first, second = done.stdout.split("\n\n" + str(logs[1]))
    for text, log in ((first, logs[0]), (str(logs[1]) + second, logs[1])):
        lines = text.splitlines()
        assert lines[0].startswith(f"{log}: 300 steps, ") and lines[0].endswith(
            " clipped; norms before clipping"
        )
        assert lines[1].startswith("warning: 3 of 300 steps (1.0 %) were skipped"), "first"
        assert lines[3].split()[:5] == ["percentile", "max_norm", "would", "have", "clipped"]
        table = lines[4 : lines.index("", 4)]
        assert {line.split()[0] for line in table} >= {"50", "75", "90", "95", "99", "99.9", "max"}
        norms = np.array([row["total_norm"] or math.nan for row in rows_of(log)])
        for line in table:
            bound = float(line.split()[1])
            share = line[24:42].strip()
            assert share == percent((norms[np.isfinite(norms)] > bound).mean())
        (advice,) = [line for line in lines if line.startswith("recommendation: max_norm=")]
        number = advice.split("=")[1].split(",")[0]
        (marked,) = [line for line in table if line.endswith("<- recommended")]
        assert marked.split()[1] == number and max(map(len, table)) <= 100


def test_digits_and_shares_as_words():
    assert [times(x) for x in (1.0, 1.044, 2.34, 9.94, 12.4, 3312, 3.3e14)] == [
        "1",
        "1.04",
        "2.3",
        "9.9",
        "12",
        "3,300",
        "3.3e+14",
    ]
    assert [percent(x) for x in (0, 0.0004, 0.043, 0.0996, 0.88, 0.996, 0.9996, 1)] == [
        "0 %", "under 0.1 %", "4.3 %", "10 %", "88 %", "99.6 %", "over 99.9 %", "100 %",
    ]  # fmt: skip


def test_the_running_median_is_that_of_numpy():
    norms = noisy(steps=9000)
    norms[[5, 300, 301, 8999]] = np.nan
    norms[4000:4200] = np.nan
    ours = running_median(norms)
    for i in (50, 299, 340, 4000, 4100, 4150, 6000, 8949):
        window = np.sort(norms[i - 50 : i + 51])
        known = window[np.isfinite(window)]
        exact = known[(len(known) - 1) // 2] if len(known) else np.nan
        np.testing.assert_equal(ours[i], exact)
    assert ours[0] == ours[50] and ours[-1] == ours[8949] and len(ours) == 9000
    assert running_median(np.array([3.0, 1.0])).tolist() == [1.0, 1.0]


def cosines(row):
    return row | {"cosine": [0.4 if row["step"] % 4 == 0 else 0.99]}


def steady(steps=200):
    return 1 + 0.1 * np.sin(np.arange(steps))


def test_what_value_clipping_and_groups_deserve(tmp_path, capsys):
    clamped = write_log(tmp_path / "value.jsonl", steady(), distclip.FixedValue(0.01))
    (run,) = suggested(capsys, clamped)
    assert run["warnings"] == [
        "value clipping acted at 100 % of the steps: the threshold sets the length of most steps, "
        "is a part of the learning rate, and less of a safety net"
    ]
    assert run["recommendation"]["max_norm"] == pytest.approx(0.02, rel=0.12), "its clamped length"
    bent = rewritten(write_log(tmp_path / "bent.jsonl", steady()), cosines)
    (run,) = suggested(capsys, bent)
    assert run["warnings"][-1] == (
        "value clipping bends the direction: at 25 % of the steps the cosine between raw and "
        "clipped gradient is below 0.9, down to 0.4; a norm threshold keeps the direction"
    )
    groups = write_log(
        tmp_path / "groups.jsonl", steady(), distclip.FixedNorm(0.74), names=("a", "b"), groups=distclip.per_parameter()
    )  # fmt: skip
    (run,) = suggested(capsys, groups)
    assert run["warnings"] == [
        "this run clipped 2 groups by norms of their own; what is said here is of the norm over "
        "all of them"
    ]


def test_measuring_alone_is_said_and_not_called_never_clipped(tmp_path, capsys):
    log = write_log(tmp_path / "run.jsonl", steady(), distclip.FixedNorm(math.inf))
    assert suggested(capsys, log)[0]["warnings"] == []
    assert main(["suggest", str(log)]) == 0
    assert f"{log}: 200 steps, no threshold was set; norms" in capsys.readouterr().out


def test_a_run_without_norms_is_refused(tmp_path, capsys):
    log = write_log(tmp_path / "run.jsonl", [math.nan] * 3)
    assert main(["suggest", str(log)]) == 2
    assert capsys.readouterr().err == (
        f"distclip suggest: {log}: none of its 3 steps has a finite "
        f"norm above 0; log a run that trains\n"
    )


@pytest.mark.parametrize("command", ["suggest", "report"])
def test_without_the_extra_it_says_what_to_install(command, tmp_path, capsys, monkeypatch):
    for module in [m for m in sys.modules if m.startswith("distclip.cli.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "msgspec", None)  # as if it were not installed
    assert main([command, str(tmp_path / "run.jsonl")]) == 1
    assert capsys.readouterr().err == (
        f"distclip {command}: logs are read with numpy and msgspec: pip install "
        f'"distclip[report]"\n'
    )
