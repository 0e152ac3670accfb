"""Every strategy of the training program is the same training: norms, skipped steps, and resumed
runs, on four ranks."""

import pytest

from launch.programs import lines, norms, train_here, train_with

STRATEGIES = ("ddp", "fsdp1", "fsdp2", "hsdp", "tp", "pp", "tp_fsdp2")
SMALL = (
    "--model", "gpt", "--data.name", "text", "--training.steps", "6", "--training.batch", "8", "--training.accumulate", "2",
    "--training.optimizer", "adamw", "--training.lr", "0.003", "--training.warmup", "1000", "--clip.threshold", "0.8",
)  # fmt: skip
BAD = ("--inject.kind", "nan", "--inject.step", "2", "--inject.rank", "3")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Norms of one process that sees the whole batch: all steps taken, and with the third left
    out."""
    out = []
    for bad in ((), ("--inject.kind", "nan", "--inject.step", "2")):
        log = tmp_path_factory.mktemp("alone") / "log.jsonl"
        train_here(*SMALL, *bad, "--strategy", "single", "--output.log", str(log))
        out.append(norms(log))
        assert any(row["clipped"] for row in lines(log)), "vacuous"
    assert out[0][3] != out[1][3], "vacuous: it makes no difference whether the step is taken"
    return out


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_norms_are_those_of_one_process_and_a_resumed_run_equals_an_uninterrupted_one(
    ranks, alone, tmp_path, strategy
):
    def run(name, steps):
        return train_with(
            ranks, *SMALL, "--strategy", strategy, "--training.steps", str(steps), "--output.every", "3",
            "--output.log", str(tmp_path / f"{name}.jsonl"), "--output.checkpoint", str(tmp_path / name),
        )  # fmt: skip

    for name, steps in (("whole", 6), ("halves", 3), ("halves", 6)):
        said = run(name, steps)
        assert "steps: " in said and ", equal on all ranks" in said and "NOT EQUAL" not in said
    assert norms(tmp_path / "whole.jsonl") == pytest.approx(alone[0], rel=1e-4)
    assert norms(tmp_path / "halves.jsonl") == norms(tmp_path / "whole.jsonl")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bad_gradient_of_one_rank_stops_all(ranks, alone, tmp_path, strategy):
    log = tmp_path / "log.jsonl"
    said = train_with(ranks, *SMALL, *BAD, "--strategy", strategy, "--output.log", str(log))
    rows = lines(log)
    assert [row["step"] for row in rows if row["skipped"]] == [3]
    assert [(c["rank"], c["kind"]) for c in rows[2]["culprits"]] == [(3, "NaN")]
    assert [n for n in norms(log) if n is not None] == pytest.approx(
        [n for n in alone[1] if n is not None], rel=1e-4
    )
    assert "NOT EQUAL" not in said


def test_a_checkpoint_goes_over_to_another_strategy(ranks, alone, tmp_path):
    for strategy, steps in (("pp", 3), ("tp_fsdp2", 6)):
        train_with(
            ranks, *SMALL, "--strategy", strategy, "--training.steps", str(steps),
            "--output.log", str(tmp_path / "log.jsonl"), "--output.checkpoint", str(tmp_path / "run"),
        )  # fmt: skip
    assert norms(tmp_path / "log.jsonl") == pytest.approx(alone[0], rel=1e-4)
