"""Shares against NumPy, each warning by a run that deserves it, and the recommendation by cases."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

import distclip
from cli.logs import BAD, rewritten, rows_of, spiky_norms, write_log
from distclip.cli import main

PERCENTILES = [50, 75, 90, 95, 99, 99.9, 100]


def suggested(capsys, *arguments):
    assert main(["suggest", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)["runs"]


def test_shares_are_those_of_numpy(tmp_path, capsys):
    log = write_log(tmp_path / "run.jsonl", spiky_norms())
    norms = np.array([row["total_norm"] for row in rows_of(log) if row["total_norm"] is not None])
    assert len(norms) == 300 - len(BAD)
    (run,) = suggested(capsys, log)
    assert run["steps"] == 300 and run["not_finite"] == run["skipped"] == len(BAD)
    assert run["clipped_share"] == pytest.approx((norms > 1).sum() / 300)
    assert [c["percentile"] for c in run["candidates"]] == PERCENTILES
    for candidate in run["candidates"]:
        exact, bound = np.percentile(norms, candidate["percentile"]), candidate["max_norm"]
        assert bound == pytest.approx(exact, rel=1e-3) and float(f"{bound:.4g}") == bound, (
            "4 digits, as printed"
        )
        assert candidate["share"] == (norms > bound).mean(), "the share of the number as printed"
    assert (
        run["candidates"][-1]["share"]
        == 0
        < run["candidates"][-2]["share"]
        <= run["candidates"][0]["share"]
    )


def test_the_command_prints_a_table_a_recommendation_and_warnings(tmp_path):
    logs = [
        write_log(tmp_path / f"{name}.jsonl", spiky_norms(seed=seed))
        for seed, name in enumerate("ab")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "distclip", "suggest", *map(str, logs)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == ""
    first, second = done.stdout.split("\n\n" + str(logs[1]))
    for text, log in ((first, logs[0]), (str(logs[1]) + second, logs[1])):
        lines = text.splitlines()
        assert lines[0].startswith(f"{log}: 300 steps, ") and lines[0].endswith(
            " clipped; norms before clipping"
        )
        assert lines[2].split() == ["percentile", "max_norm", "would", "have", "clipped"]
        assert [line.split()[0] for line in lines[3:10]] == [
            "50",
            "75",
            "90",
            "95",
            "99",
            "99.9",
            "max",
        ]
        norms = np.array([row["total_norm"] or math.nan for row in rows_of(log)])
        for line in lines[3:10]:
            _, bound, share = line.split()
            assert share == f"{(norms[np.isfinite(norms)] > float(bound)).mean():.1%}"
        assert (
            lines[11].startswith("recommendation: max_norm=1.")
            and "the 95th percentile: ordinary steps pass" in lines[11]
        )
        assert (
            "warning: 3 of 300 steps had norms that are not finite; they are left out of all "
            "percentiles" in lines
        )
        assert any(
            line.startswith(
                "warning: 3 steps have norms above 10 times the running median (step 91, 92, 251;"
            )
            for line in lines
        )
        assert sum(line.endswith("clipping hides that, look at their data") for line in lines) == 1


def steady(steps=200):
    return 1 + 0.1 * np.sin(np.arange(steps))


SPIKED = np.where(np.arange(200) == 120, 50, steady())
RISING = steady() * np.linspace(1, 5, 200)


DRIFTS = (
    "from the first to the last third of the run: one fixed threshold does not fit both; "
    "look "
    "at AutoClip, ZClip or Scheduled"
)


def cosines(row):
    return row | {"cosine": [0.4 if row["step"] % 4 == 0 else 0.99]}


# what the run is → (norms, options, change of the rows, the warning)
WARNED = {
    "always": (
        steady(), {"policy": distclip.FixedNorm(0.5)}, None,
        "the run was clipped at 100.0% of the steps: the threshold sets the length of nearly every "
        "step and is no safety net",
    ),
    "always clamped": (
        steady(), {"policy": distclip.FixedValue(0.01)}, None,
        "value clipping acted at 100.0% of the steps: the threshold sets the length of nearly "
        "every step and is no safety net",
    ),
    "never": (
        steady(), {"policy": distclip.FixedNorm(5.0)}, None,
        "the run was never clipped: its threshold was above every norm and did nothing",
    ),
    "spikes": (
        SPIKED, {"policy": distclip.FixedNorm(1.05)}, None,
        "1 step has a norm above 10 times the running median (step 121; the largest "
        f"{50 / np.median(SPIKED[70:171]):.3g} times, at step 121); "
        "clipping hides that, look at their data",
    ),
    "bent": (
        steady(), {"policy": distclip.FixedNorm(1.05)}, cosines,
        "value clipping bends the direction: at 25.0% of the steps the cosine between raw and "
        "clipped gradient is below 0.9, "
        "down to 0.4; a norm threshold keeps the direction",
    ),
    "falls": (
        RISING[::-1], {"policy": distclip.FixedNorm(3.0)}, None,
        f"the median norm falls to {np.median(RISING[:66]) / np.median(RISING[-66:]):.0%} " + DRIFTS,
    ),
    "rises": (
        RISING, {"policy": distclip.FixedNorm(3.0)}, None,
        f"the median norm rises {np.median(RISING[-66:]) / np.median(RISING[:66]):.3g}-fold " + DRIFTS,
    ),
    "few": (
        steady(30), {"policy": distclip.FixedNorm(1.05)}, None,
        "only 30 steps: percentiles above 97 are the largest step or two; log at least 100",
    ),
    "groups": (
        steady(), {"policy": distclip.FixedNorm(0.74), "names": ("a", "b"), "groups": distclip.per_parameter()}, None,
        "this run clipped 2 groups by norms of their own; what is said here is of the norm over "
        "all of them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("norms, options, change, text", WARNED.values(), ids=WARNED)
def test_what_deserves_a_warning_gets_that_one_alone(
    norms, options, change, text, tmp_path, capsys
):
    log = write_log(tmp_path / "run.jsonl", norms, **options)
    if change is not None:
        rewritten(log, change)
    (run,) = suggested(capsys, log)
    assert run["warnings"] == [text]


def test_an_ordinary_run_gets_none(tmp_path, capsys):
    (run,) = suggested(
        capsys, write_log(tmp_path / "run.jsonl", steady(), distclip.FixedNorm(1.05))
    )
    assert run["warnings"] == run["notes"] == [] and 0 < run["clipped_share"] < 0.95


def test_measuring_alone_is_not_called_never_clipped(tmp_path, capsys):
    (run,) = suggested(
        capsys, write_log(tmp_path / "run.jsonl", steady(), distclip.FixedNorm(math.inf))
    )
    assert run["warnings"] == [] and run["clipped_share"] == 0


def spoiled(every):
    """Each `every`-th step is a spike."""
    return np.where(np.arange(200) % every == every // 2, 100, steady())


ADVICE = {
    "the 95th percentile": (
        steady(), distclip.FixedNorm(1.05), np.percentile(steady(), 95),
        "the 95th percentile: ordinary steps pass, 4.5% would have been clipped there",
    ),
    "the last third": (
        RISING[::-1], distclip.FixedNorm(3.0), np.percentile(RISING[66::-1], 95),
        "the 95th percentile of the last third of the run, since the norm drifts",
    ),
    "below frequent spikes": (spoiled(8), distclip.FixedNorm(1.05), np.percentile(spoiled(8), 75), "spikes are so frequent"),
    "the length it had": (
        steady() * 20, distclip.FixedNorm(0.5), 0.5,
        "the length of this run's clipped steps; norms were 40 times that, so anything higher "
        "lengthens nearly every step: "
        "lower the learning rate by as much",
    ),
    "the length of clamped steps": (steady() * 20, distclip.FixedValue(0.01), 0.02, "the length of "
                                                                                    "this run's "
                                                                                    "clipped steps"),
    "none after a blow-up": (
        np.where(np.arange(200) == 1, 1e12, steady()), distclip.FixedNorm(math.inf), None,
        "the run blew up at step 2 and its norms tell nothing; log one that is clipped, say at 1",
    ),
    "none of zeros": (np.where(np.arange(200) % 3 == 0, 1.0, 0.0), distclip.FixedNorm(0.5), None, "at least half of the norms are 0"),
}  # fmt: skip


@pytest.mark.parametrize("norms, policy, bound, reason", ADVICE.values(), ids=ADVICE)
def test_the_recommendation_and_its_reason(norms, policy, bound, reason, tmp_path, capsys):
    log = write_log(tmp_path / "run.jsonl", norms, policy)
    (run,) = suggested(capsys, log)
    advice = run["recommendation"]
    assert reason in advice["reason"]
    assert advice["max_norm"] == (None if bound is None else pytest.approx(bound, rel=1e-3))
    assert main(["suggest", str(log)]) == 0
    said = "none" if bound is None else f"max_norm={advice['max_norm']:g}"
    assert f"recommendation: {said}, " in capsys.readouterr().out


def test_a_run_without_norms_is_refused(tmp_path, capsys):
    log = write_log(tmp_path / "run.jsonl", [math.nan] * 3)
    assert main(["suggest", str(log)]) == 2
    assert capsys.readouterr().err == (
        f"distclip suggest: {log}: none of its 3 steps has a finite "
        f"norm above 0; log a run that trains\n"
    )
