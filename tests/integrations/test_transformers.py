"""Trainer with distclip's one line, against a float64 oracle in one process."""

import pytest

from integrations.launched import launched

pytest.importorskip("transformers")

LAYOUTS = {"single": 0, "ddp": 2, "fsdp1": 2, "fsdp2": 2, "deepspeed": 2}


@pytest.fixture(scope="module", params=LAYOUTS)
def rows(request):
    return launched("trainer_loop.py", request.param, ranks=LAYOUTS[request.param])


@pytest.mark.parametrize("case", ["clip", "tiny", "huge", "zero", "accumulate", "part"])
def test_the_update_is_the_oracles(rows, case):
    for row in rows:
        seen = row[case]
        assert seen["norm"] > 0.1, "vacuous"
        assert seen["off"] <= 1e-6 and seen["norm_off"] <= 1e-6
        assert seen["calls"] == 1 and seen["still"] == 0
    assert len({row[case]["bits"] for row in rows}) == 1


def test_neither_both_clip_nor_neither(rows):
    for row in rows:
        assert row["huge"]["moved"] > 0.1 and row["zero"]["moved"] > 0.1
        assert row["tiny"]["moved"] < 1e-8


def test_the_log_tells_norm_coefficient_and_rate(rows):
    for row in rows:
        logs = row["clip"]["logs"]
        assert logs["grad_norm"] == pytest.approx(row["clip"]["norm"], rel=1e-6)
        assert logs["clip_coef"] == pytest.approx(0.1 / row["clip"]["norm"], rel=1e-6)
        assert (logs["clip_rate"], logs["clip_skipped"]) == (1.0, 0)
        assert row["huge"]["logs"]["clip_coef"] == 1 and row["huge"]["logs"]["clip_rate"] == 0


def test_an_adaptive_policy_resumes_with_the_checkpoint(rows):
    if "resumed" not in rows[0]:
        pytest.skip("the state does not depend on the sharding: shown under one process and DDP")
    assert all(row["resumed"] == {"step": 4, "equal": True} for row in rows)


def test_the_state_is_that_of_the_checkpoint_wherever_trainer_writes_it(rows):
    if "wherever" not in rows[0]:
        pytest.skip("the same code")
    for row in rows:
        seen = dict(row["wherever"])
        straight, other = seen.pop("straight"), seen.pop("another run's")
        assert straight != other, "vacuous"
        assert len(seen) == 5
        for name, state in seen.items():
            assert state == straight, name


def test_a_checkpoint_without_a_state_is_told(rows):
    if "without" not in rows[0]:
        pytest.skip("the same code")
    said = (
        "the checkpoint of step 2 that training resumes from should hold the state of distclip's "
        "clipper in its trainer_state.json, and "
        "holds {}: adaptive thresholds and counters begin anew"
    )
    for row in rows:
        assert row["without"] == [said.format("that of step 1"), 1, said.format("none"), 1]


def test_each_training_is_clipped_once(rows):
    if "again" not in rows[0]:
        pytest.skip("the same code")
    for row in rows:
        seen = row["again"]
        for exact, told in seen["norms"]:
            assert exact > 0.1, "vacuous"
            assert told == pytest.approx(exact, rel=1e-6)
        # the last training is clipped by Accelerate, whose coefficient is c / (n + 1e-6)
        assert max(seen["off"]) <= 2e-5
        assert seen["calls"] == [1, 1] and seen["own"] == [False] * 3 and seen["objects"] == [0, 0]


def test_refusals_read_well(rows):
    if "refused" not in rows[0]:
        pytest.skip("the same code")
    for row in rows:
        assert row["refused"] == [
            "max_grad_norm=0.0 tells Trainer not to clip; leave it at 1.0 when a policy is passed",
            "this trainer is clipped by distclip already; call clip_with_distclip once",
        ]
