"""A step's numbers by the kernels: under triton's interpreter the same bits as by torch's
operations, and in the project's own tests; compiled for GPUs that are not here."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distclip.kernels import triton_lists
from distclip.p_norm import rounding_of
from kernels import step_cases as cases
from kernels import triton_cases
from kernels.elsewhere import Elsewhere

pytestmark = pytest.mark.skipif(not triton_lists.has_triton(), reason="triton is not installed")
ROOT = Path(__file__).parents[2]


def test_messages(interpreted):
    """Sums of any groups and layers, stats, ranks' norms, inf and NaN, what a scaler met, tokens
    with a loss scale."""
    seen = interpreted.run(cases.messages)
    assert max(off for off, _, _ in seen) < 1e-15 and all(same for _, same, _ in seen)
    assert sum(count for _, _, count in seen) > 500, "vacuous"


def test_decisions(interpreted):
    """Whatever may be wrong with a step, norms on their threshold and next to it, thresholds of 0
    and inf, groups that do not count, more groups than are looked at side by side."""
    seen = interpreted.run(cases.decisions)
    assert [off for off, _, _, _ in seen if off] == []
    for part in zip(*(flags for _, *flags in seen), strict=True):
        assert 10 < sum(part) < len(seen) - 10, "vacuous"


@pytest.mark.parametrize("num_groups", [3, 1100])
def test_counters(interpreted, num_groups):
    """Beyond the window of the clip rate."""
    off, rate, skips, last_hash = interpreted.run(cases.counters, num_groups)
    assert off == [] and 0.6 < rate < 0.8 and skips > 20 and last_hash


def test_a_deep_copy():
    elsewhere = Elsewhere(TRITON_INTERPRET="1")  # it replaces what others ask
    norms, calls = elsewhere.run(cases.a_deep_copy)
    elsewhere.pool.shutdown()
    root = 8**0.5
    assert norms == pytest.approx([7 * root, 11 * root, 1.0]) and calls == [3, 2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Two gloo ranks. Not those of a `World`, which descend from a process that may have imported
    triton before the flag was set."""
    store = str(tmp_path_factory.mktemp("ranks") / "store")
    pair = [Elsewhere(TRITON_INTERPRET="1") for _ in range(2)]

    def run(function, *args):
        asked = [rank.pool.submit(function, *args) for rank in pair]
        return [answer.result(timeout=300) for answer in asked]

    met = [pair[rank].pool.submit(cases.join_ranks, store, rank) for rank in range(2)]
    for each in met:
        each.result(timeout=300)
    yield run
    for rank in pair:
        rank.pool.shutdown()


def test_ranks_take_the_same_steps(ranks):
    one, other = ranks(cases.on_ranks, False)
    assert one == other, "bit for bit"
    norms, oracle, _, error, launched = one
    assert norms == pytest.approx(oracle, rel=1e-6) and min(oracle) > 1 and not error
    assert [launched.count(name) for name in ("pack_words", "decide_fixed", "record_step")] == [
        4
    ] * 3


def test_a_rank_that_differs_is_told_on_all(ranks):
    (_, _, params, error, _), (_, _, others, error_there, _) = ranks(cases.on_ranks, True)
    assert error == error_there and error.startswith("AgreementError: step 3: ")
    assert params == others, "the step was not taken on either"


def test_the_tests_of_late_steps_hold():
    """The project's own, with these kernels where the CPU stands in for a device: some of the
    random runs against torch's own unscale, clip and step, and all of folded steps."""
    files = ("precision/test_random_runs.py", "apply/test_fused.py")
    names = [str(ROOT / "tests" / file) for file in files]
    some = ["-k", "test_fused or (device and not 2 and not 3 and not 4 and not 5)"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "interpreted", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *names, *some],
        cwd=ROOT,
        env=os.environ
        | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT / 'src'}"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    counts = done.stdout.partition("launched: ")[2].partition("\n")[0]
    launched = dict(pair.split() for pair in counts.split(", "))
    assert len(launched) == 3 and min(map(int, launched.values())) > 50, done.stdout[-300:]


FEW, MANY = (128, 1), (1024, 4)
TARGETS = pytest.mark.parametrize(
    "target, size", [*((target, FEW) for target in (75, 80, 90, 100, 120)), (90, MANY)], ids=str
)
ROUNDING = dict(zip(("LARGEST", "SHIFT", "ODD", "UP", "KEPT"), rounding_of(24), strict=True))


@TARGETS
@pytest.mark.parametrize("is_max", [False, True], ids=["sum", "max"])
def test_the_message_compiles(compiler, target, size, is_max):
    constants = {
        "IS_MAX": is_max,
        "MIXER": -(1 << 62) - 1,
        "LANES": size[0],
    }
    ptx, loops, (_, spilled) = compiler.run(
        triton_cases.compiled, "pack_words", target, size[1], constants
    )
    assert loops and not spilled and not re.search(r"\b(?:atom|red)\.", ptx)


@TARGETS
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_the_decision_compiles(compiler, target, size, norm_type):
    """Each operation is rounded by itself, and to nearest: other ranks may use torch's."""
    constants = {
        "IS_MAX": norm_type == math.inf,
        "IS_SQUARE": norm_type == 2, "PROPAGATES": False, "TOLERANCE": 1e-5, "PRESENCE": 1e-6,
        **ROUNDING, "LANES": size[0],
    }  # fmt: skip
    ptx, _, (_, stack) = compiler.run(
        triton_cases.compiled, "decide_fixed", target, size[1], constants
    )
    assert stack <= 64  # a quotient in float64 may be a call, which is given a few words
    assert "div.rn.f64" in ptx and not re.search(r"\.approx|\bfma\.|\bmad\.f", ptx)
    assert ("sqrt.rn.f64" in ptx) == (norm_type == 2)
    if norm_type == 2:  # 1e-5 and 1e-6 as float64: as float32 they would be others
        assert "0d3EB0C6F7A0B5ED8D" in ptx and "0d3EE4F8B588E368F1" in ptx


@TARGETS
def test_the_counters_compile(compiler, target, size):
    constants = {"WINDOW": 500, "HASHES": True, "LANES": size[0]}
    ptx, _, (_, spilled) = compiler.run(
        triton_cases.compiled, "record_step", target, size[1], constants
    )
    assert not spilled and "div.rn.f64" in ptx
