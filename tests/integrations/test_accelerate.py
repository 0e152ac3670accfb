"""Accelerate: its loop with distclip's one line, against a float64 oracle in one process, under
every layout that a CPU runs."""

from functools import cache

import numpy as np
import pytest

from integrations.launched import assert_as_the_oracle, launched

pytest.importorskip("accelerate")

LAYOUTS = {"single": 0, "ddp": 2, "fsdp1": 2, "fsdp2": 2, "tp": 2, "deepspeed": 2}


@cache
def rows_of(layout):
    return launched("accelerate_loop.py", layout, ranks=LAYOUTS[layout])


@pytest.fixture(scope="module", params=LAYOUTS)
def rows(request):
    return rows_of(request.param)


@pytest.mark.parametrize("case", ["clip", "tiny", "huge", "value", "groups", "accumulate", "part"])
def test_the_update_is_the_oracles(rows, case):
    if case not in rows[0]:
        pytest.skip("refused under DeepSpeed: test_deepspeed_refuses_what_it_cannot_do")
    for row in rows:
        seen = row[case]
        assert seen["off"] <= 1e-6 and seen["norm_off"] <= 1e-6 and seen["plain"]
        assert seen["norm"] > 0.1, "vacuous"
    assert len({row[case]["bits"] for row in rows}) == 1


def test_nothing_happens_on_a_micro_step(rows):
    assert all(row["accumulate"]["idle"] == [True] for row in rows)


def test_two_models_are_clipped_apart_and_together(rows):
    if "two_models" not in rows[0]:
        pytest.skip("each engine is its own model")
    for row in rows:
        assert all(abs(error) <= 1e-6 for error in row["two_models"]["apart"])
        assert row["two_models"]["norm"] > 0.1, "vacuous"
        assert row["two_models"]["after"] == pytest.approx(0.1 * 2**0.5, rel=1e-6)


def test_refusals_read_well(rows):
    if len(rows[0].get("refusals", {"texts": []})["texts"]) != 5 or "value" not in rows[0]:
        pytest.skip("the same code as under the other layouts")
    for row in rows:
        assert row["refusals"]["texts"] == [
            "clip_grad_norm_ was called with max_norm=0.5, norm_type=2, but distclip was prepared "
            "with max_norm=1.0, norm_type=2 for this "
            "model; make them equal",
            "4 of 4 parameters are of no model that distclip knows; call "
            "distclip.integrations.accelerate.prepare(accelerator, model, "
            "max_norm=...) for that model too",
            "max_norm=None: parts of a model, and several together, have no policy of their own; "
            "pass a number",
            "prepare(accelerator, model, max_norm=...) needs the model that accelerator.prepare "
            "returned",
            "prepare(accelerator, ..., grad_of=): Accelerate steps what is in .grad; use "
            "GradClipper itself for other gradients",
        ]


def test_an_overflow_stops_the_optimizer_concerned_on_all_ranks(rows):
    if "overflow" not in rows[0]:
        pytest.skip("Accelerate's fp16 with FSDP needs a GPU")
    for row in rows:
        assert row["fp16"]["off"] <= 1e-6
        assert row["overflow"] == {"moved": [[False, True], [True, True]], "scale": 512.0}


def test_an_adaptive_policy_is_checkpointed(rows):
    if "checkpoints" not in rows[0]:
        pytest.skip("the state does not depend on the sharding: shown under one process and DDP")
    assert all(row["checkpoints"]["equal"] and row["checkpoints"]["step"] == 6 for row in rows)


def test_it_resumes_on_another_world_size():
    saved = rows_of("ddp")[0]["checkpoints"]
    (resumed,) = launched("accelerate_loop.py", "single", saved["folder"], ranks=0)
    before, after = (
        [np.ravel(part) for part in row["state"]] for row in (saved, resumed["checkpoints"])
    )
    assert resumed["checkpoints"]["step"] == 6 and len(before) == len(after) > 2
    for one, other in zip(before, after):
        assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("order", ["apart", "together", "overflow"])
def test_in_fp16_each_of_two_optimizers_is_unscaled_once(rows, order):
    if f"fp16 {order}" not in rows[0]:
        pytest.skip("Accelerate's fp16 with FSDP needs a GPU")
    for row in rows:
        seen = row[f"fp16 {order}"]
        assert seen["off"] <= 1e-6 and seen["norm_off"] <= 1e-6
        assert seen["scale"] == (512.0 if order == "overflow" else 1024.0)


def test_a_part_that_is_not_finite_stops_the_whole_step(rows):
    if "part_bad" not in rows[0]:
        pytest.skip("parts are refused under DeepSpeed")
    assert all(row["part_bad"] for row in rows)


def test_parameters_that_begin_to_train_later(rows):
    if "unfrozen" not in rows[0]:
        pytest.skip("shown under one process and DDP")
    assert all(
        row["unfrozen"]["norm_off"] <= 1e-6 and row["unfrozen"]["calls"] == 1 for row in rows
    )


@pytest.mark.parametrize("part", ["whole", "part", "value"])
def test_exactly_the_parameters_passed_count_whose_turn_ever_it_is(rows, part):
    if f"turns {part}" not in rows[0]:
        pytest.skip(
            "parts are refused under DeepSpeed; FSDP1 shards frozen and trained parameters together"
        )
    for row in rows:
        turns = row[f"turns {part}"]
        assert [turn["stale"] for turn in turns] == [0, 2, 2, 2], (
            "vacuous: no gradients of another turn are left"
        )
        for turn in turns:
            assert turn["norm"] > 0.7, "vacuous"
            assert turn["norm_off"] <= 1e-6 and turn["grad_off"] <= 3e-6
            assert turn["stale_kept"]
        # one message a clip, whatever is frozen; the first clip of parts is a set-up
        ranks = len(rows) > 1
        assert [turn["collectives"] for turn in turns[2:]] == [int(ranks)] * 2
        if part == "whole":
            assert [turn["collectives"] for turn in turns[:2]] == [int(ranks)] * 2
    for turn in range(4):
        assert len({row[f"turns {part}"][turn]["norm_off"] for row in rows}) == 1


def test_frozen_ones_single_ones_and_none(rows):
    if "passed" not in rows[0]:
        pytest.skip("shown under one process and DDP")
    for row in rows:
        seen = row["passed"]
        for exact, told in (seen[what] for what in ("frozen", "trainable", "one")):
            assert exact > 0.1 and told == pytest.approx(exact, rel=1e-6)
        assert seen["frozen"][0] > seen["trainable"][0] + 0.1, "vacuous"
        assert seen["none"] == 0 and seen["said"] == (
            "no parameter has a gradient on any rank: nothin"
        )
        assert seen["left"] == 0, "a step that is left out is left out whole"


def test_what_no_optimizer_holds_is_told(rows):
    if "in_no_optimizer" not in rows[0]:
        pytest.skip("shown under one process and DDP")
    for row in rows:
        assert row["in_no_optimizer"]["norm_off"] <= 1e-6
        (text,), nothing = row["in_no_optimizer"]["said"]
        assert nothing == []
        assert text.removeprefix("module.") == (
            "0.weight has a gradient and was passed to be clipped, but is in no optimizer of this "
            "accelerator (2 such parameters): it "
            "counts in the norm, and optimizer.zero_grad() does not clear it. Give it to an "
            "optimizer, or freeze it and set its .grad to "
            "None, or pass the other parameters alone"
        )


def test_in_fp16_the_rest_of_an_optimizer_is_unscaled_too(rows):
    if "part_fp16" not in rows[0]:
        pytest.skip("Accelerate's fp16 with FSDP needs a GPU")
    for row in rows:
        for exact, told in row["part_fp16"]["norms"].values():
            assert exact > 0.1 and told == pytest.approx(exact, rel=1e-6)
        assert row["part_fp16"]["off"] <= 1e-6 and row["part_fp16"]["scale"] == 1024


def test_prepared_again_forgotten_and_given_back(rows):
    if "again" not in rows[0]:
        pytest.skip("shown under one process and DDP")
    for row in rows:
        seen = row["again"]
        assert seen["norm"] > 0.1, "vacuous"
        assert seen["norm_off"] <= 1e-6 and seen["off"] <= 1e-6
        assert (seen["saved"], seen["saved after"], seen["alive"], seen["own again"]) == (
            1,
            0,
            False,
            True,
        )
        assert seen["forgotten"].startswith(
            "4 of 4 parameters are of no model that distclip "
            "knows; call distclip.integrations.accelerate."
        )


def test_clips_of_the_same_objects_go_through_no_module(rows):
    if "repeated" not in rows[0]:
        pytest.skip("shown under one process and DDP")
    for row in rows:
        seen = row["repeated"]
        assert all(exact > 0.2 for exact, _ in seen["norms"]), "vacuous"
        for (exact, told), after in zip(seen["norms"], seen["after"], strict=True):
            assert told == pytest.approx(exact, rel=1e-6) and after == pytest.approx(0.1, rel=1e-6)
        first, *again, part, whole, once_more, new_optimizer, then = seen["walks"]
        assert again == [0, 0] and once_more == then == 0
        assert min(first, part, whole, new_optimizer) > 0, "vacuous: nothing is counted"
        assert seen["refused"].startswith("clip_grad_norm_ was called with max_norm=0.5")
        if "late" in seen:  # a parameter that joined the model and was not passed
            exact, told, grad = seen["late"]
            assert told == pytest.approx(exact, rel=1e-6) and grad == [1.0] * 3


def test_inside_join_a_clip_is_refused(rows):
    if "joined" not in rows[0]:
        pytest.skip("for DDP, by the core's refusal")
    for row in rows:
        assert len(row["joined"]["texts"]) == 3
        assert all("join()" in text for text, _ in row["joined"]["texts"])
        assert row["joined"]["texts"][0][1] == 0, "something was sent"
        assert row["joined"]["after"] > 0.1, "outside it is none of distclip's business"


def test_deepspeed_refuses_what_it_cannot_do(rows):
    if "value" in rows[0]:
        pytest.skip("for DeepSpeed")
    advice = (
        "prepare(accelerator, model, policy=distclip.FixedValue(...)), or "
        "groups=distclip.by_name({...})"
    )
    for row in rows:
        other, part, value, early = row["refusals"]["texts"]
        assert other.startswith(
            "clip_grad_norm_ was called with max_norm=0.5, norm_type=2, but "
            "distclip was prepared with max_norm=1.0"
        )
        already = "under DeepSpeed accelerator.backward() already takes the step, so"
        assert part == (
            f"{already} parts of a model cannot be clipped after it; tell prepare: {advice}"
        )
        assert value == (
            f"{already} elements, by value, cannot be clipped after it; tell prepare: {advice}"
        )
        assert early == (
            "no step was taken yet; under DeepSpeed accelerator.backward() clips and "
            "steps: call it first"
        )


def test_a_compiled_model_is_clipped_as_the_eager_one():
    (row,) = rows_of("single")
    seen = row["compiled"]
    if seen is None:
        pytest.skip("inductor needs a C++ compiler: g++, or its path in CXX")
    assert seen["kind"] == "OptimizedModule" and seen["graphs"] >= 2, "vacuous: nothing compiled"
    assert min(seen["no"]) > 1 and len(set(seen["no"])) == 3, "vacuous"
    assert seen["inductor"] == pytest.approx(seen["no"], rel=2e-6)


@pytest.fixture(scope="module")
def mesh_rows():
    return launched("accelerate_mesh_loop.py", ranks=4)


@pytest.mark.parametrize(
    "case",
    [
        "tp and fsdp2",
        "on a flattened mesh",
        "a layer outside the plan",
        "nothing in the plan",
        "hsdp by the plugin",
        "not split, by the plugin",
    ],
)
def test_the_update_under_a_parallelism_config_is_the_oracles(mesh_rows, case):
    assert_as_the_oracle(mesh_rows, case)
    for row in mesh_rows:  # torch's norm in float32
        assert row[case]["own"] == pytest.approx(row[case]["norm"], rel=1e-5)


def test_elements_under_a_parallelism_config_are_bounded(mesh_rows):
    assert all(row["value"]["off"] <= 1e-6 for row in mesh_rows)
