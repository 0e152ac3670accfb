"""torchft: of two replica groups one is killed within a step and comes back. Clippers inside the
replica groups, against a float64 oracle in one process that knows only who was there."""

from itertools import groupby

import pytest

from integrations.launched import launched

pytest.importorskip("torchft")


@pytest.fixture(scope="module")
def told():
    (row,) = launched("torchft_loop.py", ranks=0)
    return row


def log_of(told, replica):
    return next(said["log"] for said in told["said"] if said["replica"] == replica)


def test_one_group_was_killed_trained_without_and_came_back(told):
    assert told["killed"] == [-9, -9]
    phases = [n for n, _ in groupby(entry["others"] for entry in log_of(told, 0))]
    assert phases[0] == phases[-1] == 2 and 1 in phases
    back = log_of(told, 1)
    assert len(back) == 3 and back[0]["step"] > 3, "the second life begins where the others are"
    assert all(said["left_out"] >= 1 for said in told["said"] if said["replica"] == 0), (
        "the step within which the group died was taken"
    )


def test_norms_and_decisions_are_those_of_the_groups_that_were_there(told):
    log = log_of(told, 0)
    seen = [[entry[k] for k in ("norm", "threshold", "coef")] for entry in log]
    for ours, oracle in zip(seen, told["oracle"]["steps"], strict=True):
        assert ours == pytest.approx(oracle, rel=2e-5)
    for others in (1, 2):
        coefs = [entry["coef"] for entry in log if entry["others"] == others]
        assert min(coefs) < 0.9, "vacuous: nothing was clipped"
    assert told["said"][0]["length"] == pytest.approx(told["oracle"]["length"], rel=1e-5)


def test_all_ranks_decide_alike_and_the_state_came_along(told):
    by_step = {entry["step"]: entry["bits"] for entry in log_of(told, 0)}
    for said in told["said"]:
        assert all(by_step[entry["step"]] == entry["bits"] for entry in said["log"])
    assert len({said["params"] for said in told["said"]}) == 1
    # the group that came back has taken three steps, and knows of all
    assert {said["clipped_steps"] for said in told["said"]} == {len(log_of(told, 0))}
