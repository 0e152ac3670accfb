"""DeepSpeed's experts, pipeline engine and several engines, with distclip's one line, against a
float64 oracle in one process; and where DeepSpeed's own norm is another."""

from functools import cache

import pytest

from integrations.launched import launched

pytest.importorskip("deepspeed")

MAX_NORM = 0.1
BOUNDS = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 1.5e-2}  # the rounding of gradients


@cache
def rows():
    return launched("deepspeed_parallel_loop.py", ranks=4)


def assert_right(case, name):
    """The same norm on every rank, the oracle's, and the update that follows from it."""
    bound = BOUNDS[name.split()[-1]]
    found = [case(row) for row in rows()]
    for seen in found:
        assert seen["norm"] > 2 * MAX_NORM, "vacuous"
        assert seen["norm_off"] <= bound and seen["off"] <= bound
        assert seen["engine_norm"], "get_global_grad_norm() is not the report's"
    assert len({seen["bits"] for seen in found}) == 1


@pytest.mark.parametrize("name", ["0 fp32", "0 bf16", "1 fp32", "2 fp32", "1fp32acc bf16"])
def test_experts_are_clipped_by_the_norm_of_all_of_them(name):
    assert_right(lambda row: row["experts"][name], name)


def test_experts_that_every_rank_has_whole():
    assert_right(lambda row: row["whole_experts"], "1 fp32")


def test_experts_have_names_over_all_ranks():
    for row in rows():
        seen, wanted = row["experts_by_themselves"]["seen"], row["experts_by_themselves"]["wanted"]
        assert seen == pytest.approx(wanted, rel=1e-6)
        assert len(set(wanted)) == 4 and min(wanted) > 0.02, "vacuous"


def test_deepspeeds_own_norm_of_experts_is_wrong_without_zero():
    """In float32 it averages norms over ranks with different experts (DeepSpeed#8475); in bf16 it
    leaves experts out. With ZeRO and in BF16_Optimizer it is right."""
    for row in rows():
        ours, own = row["experts"], row["own"]
        for name in ("0 fp32", "0 bf16"):
            assert ours[name]["length"] == pytest.approx(MAX_NORM, rel=1e-5)
            assert own[name]["length"] > 1.2 * MAX_NORM
        assert own["0 fp32"]["reported"] is None
        assert own["0 bf16"]["reported"] < 0.8 * own["0 bf16"]["norm"]
        for name in ("1 fp32", "1fp32acc bf16"):
            assert own[name]["length"] == pytest.approx(MAX_NORM, rel=1e-4)


def test_deepspeeds_own_clipping_halves_gradients_when_the_loss_scale_grows():
    for row in rows():
        own, ours = row["growth"]
        assert own["scales"] == ours["scales"] == [16, 16, 32, 32, 64]
        assert min(own["norms"]) > 0.8 and max(own["norms"]) < 1.0, "vacuous: half is below 0.6"
        assert ours["lengths"] == pytest.approx([0.6] * 5, rel=1e-4)
        for at in (2, 4):
            assert own["lengths"][at] == pytest.approx(own["norms"][at] / 2, rel=1e-3)
        for at in (0, 1, 3):
            assert own["lengths"][at] == pytest.approx(0.6, rel=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "plain 0 fp32",
        "tied 0 fp32",
        "plain 1 fp32",
        "plain 1fp32acc bf16",
        "plain 1immediatefp32acc bf16",
        "plain 1 fp16",
    ],
)
def test_all_stages_of_a_pipeline_are_one_norm(name):
    assert_right(lambda row: row["pipeline"][name], name)
    found = [row["pipeline"][name] for row in rows()]
    assert all(seen["calls"] == 1 for seen in found), "one call a step, whatever the micro-batches"
    assert len({tuple(seen["names"]) for seen in found}) == 2, "vacuous: one stage"


def test_tied_stages_that_are_sharded_are_refused():
    for row in rows():
        assert (
            row["refused"]
            == [
                "attach: this engine has layers tied over pipeline stages, with ZeRO or "
                "BF16_Optimizer, which distclip does not support under DeepSpeed: untie them, or "
                "train in float32 or fp16 without ZeRO"
            ]
            * 2
        )


def test_each_of_two_engines_has_its_own_clipper():
    for row in rows():
        seen = row["two_engines"]
        for told, norm, max_norm in seen["norms"]:
            assert norm > 2 * max_norm, "vacuous"
            assert told == pytest.approx(norm, rel=1e-6)
        assert seen["lengths"] == pytest.approx([0.1, 0.3], rel=1e-6)
        assert seen["calls"] == [1, 1]
