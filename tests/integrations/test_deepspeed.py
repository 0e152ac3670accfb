"""DeepSpeed: every stage and precision, with and without offload, with distclip's one line, against
a float64 oracle in one process."""

import math
from functools import cache

import pytest

from integrations.launched import launched

pytest.importorskip("deepspeed")

# stage and precision; the bound is the rounding of gradients in it. One launch for each of two halves:
# its engines run one after another, and imports are paid for once
LAUNCHES = [
    {
        "0 fp32": 1e-6,
        "0 bf16": 1e-2,
        "0 fp16": 2e-3,
        "0fused fp16": 2e-3,
        "0fused bf16": 1e-2,
        "1 fp32": 1e-6,
        "1 bf16": 1e-2,
        "1 fp16": 2e-3,
        "1fp32acc bf16": 1e-2,
        "1offload fp32": 1e-6,
        "1immediatefp32acc bf16": 1e-2,
    },
    {
        "2 fp32": 1e-6,
        "2 bf16": 1e-2,
        "2unchecked bf16": 1e-2,
        "2loose fp16": 2e-3,
        "2offload fp32": 1e-6,
        "2offload bf16": 1e-2,
        "2offload fp16": 2e-3,
        "3small fp32": 1e-6,
        "3 bf16": 1e-2,
        "3 fp16": 2e-3,
        "3offload fp32": 1e-6,
        "3offload bf16": 1e-2,
        "3offloadsmall fp16": 2e-3,
    },
]
ENGINES = {name: bound for engines in LAUNCHES for name, bound in engines.items()}


@cache
def rows_of(launch):
    return launched("deepspeed_loop.py", *LAUNCHES[launch])


@pytest.fixture(scope="module", params=ENGINES)
def engine(request):
    name = request.param
    launch = next(i for i, engines in enumerate(LAUNCHES) if name in engines)
    return [row[name] for row in rows_of(launch)], ENGINES[name], name


@pytest.mark.parametrize("case", ["clip", "tiny", "huge", "two_groups", "accumulate"])
def test_the_update_is_the_oracles(engine, case):
    rows, bound, _ = engine
    for row in rows:
        seen = row[case]
        assert seen["norm"] > 0.1, "vacuous"
        assert seen["off"] <= bound and seen["norm_off"] <= bound
        assert seen["engine_norm"], "get_global_grad_norm() is not the report's"
        assert seen["calls"] == 1, "one call a step, whatever the micro-steps"
        # whatever the rounding: the step without clipping, times the coefficient
        if "scaled_off" in seen:
            assert seen["scaled_off"] <= 1e-6
    assert len({row[case]["bits"] for row in rows}) == 1


def test_neither_both_clip_nor_neither(engine):
    for row in engine[0]:
        assert row["huge"]["coef"] == 1 and row["huge"]["moved"] > 0.1
        assert row["tiny"]["coef"] < 1e-8 and row["tiny"]["moved"] < 1e-8


def test_no_more_messages_than_deepspeeds_own_clipping(engine):
    rows, _, name = engine
    more = (
        1 if name[0] == "0" or "fp32acc" in name else 0
    )  # DeepSpeed compares nothing over ranks at stage 0; with BF16_Optimizer it still does
    for row in rows:
        assert row["clip"]["collectives"] <= row["without_distclip"]["collectives"] + more


def test_param_groups_have_norms_of_their_own(engine):
    rows, bound, _ = engine
    for row in rows:
        assert row["by_groups"]["groups"] == ["param_group 0", "param_group 1"]
        assert min(row["by_groups"]["norms"]) > 0.2, "vacuous"
        assert row["by_groups"]["off"] <= bound


def test_a_part_of_the_model_and_each_parameter_alone(engine):
    rows, bound, _ = engine
    for row in rows:
        for seen in row["by_patterns"].values():
            assert seen["clips"], "vacuous"
            assert seen["off"] <= bound and seen["norm_off"] <= bound


def test_policies_with_a_state_decide_as_outside(engine):
    for row in engine[0]:
        assert set(row["adaptive"]) == {"zclip", "adagc"}
        for seen in row["adaptive"].values():
            assert seen["smallest"] < 0.5, "vacuous"
            assert seen["coef_off"] <= 1e-6 and seen["length_off"] <= 1e-5


def test_odd_sizes_and_parameters_without_a_gradient(engine):
    rows, bound, _ = engine
    assert all(row["odd"]["norm"] > 0.1 and row["odd"]["norm_off"] <= bound for row in rows)


def test_the_state_goes_with_the_engines_checkpoint(engine):
    for row in engine[0]:
        straight, resumed = row["checkpoint"]["coefs"]
        assert straight == resumed and min(straight) < 0.9
        assert row["checkpoint"]["step"] == 6


def test_a_scheduler_built_after_attach(engine):
    rows, _, name = engine
    if name != "0 fp32":
        pytest.skip("elsewhere the engine's optimizer is none of torch's, which schedulers refuse")
    for row in rows:
        assert row["scheduled"] == {"length": pytest.approx(0.1, rel=1e-6), "lr": 0.5, "calls": 1}


def test_elements_are_bounded(engine):
    for row in engine[0]:
        assert row["clamped"]["largest"] == pytest.approx(0.03, rel=1e-6)


def test_skipped_steps_move_nothing_and_a_spike_does_not_lower_the_scale(engine):
    rows, _, name = engine
    for row in rows:
        seen = row["skipping"]
        assert seen["skipped"] == [False, False, False, True, False, True, False]
        assert seen["moved"] == [not skipped for skipped in seen["skipped"]]
        assert seen["nonfinite"] == [False, False, False, False, False, True, False]
        assert seen["engine"] == [0, 0, 0, 1, 1, 2, 2]
        assert all(told == theirs for told, theirs in seen["norms"][:5] + seen["norms"][6:])
        assert seen["norms"][3][1] > 10 * seen["norms"][0][1], (
            "a step that a policy leaves out has a norm"
        )
        told, theirs = seen["norms"][5]
        assert not math.isfinite(told) and theirs == math.inf, (
            "as DeepSpeed's own where a step is not finite"
        )
        assert seen["scale"] == ([16, 16, 16, 16, 16, 8, 8] if "fp16" in name else [])


def test_the_growth_of_the_loss_scale_does_not_change_the_clip(engine):
    rows, _, name = engine
    if "fp16" not in name:
        pytest.skip("only fp16 has a loss scale")
    for row in rows:
        assert row["growth"]["scales"] == [16, 16, 32, 32, 64, 64]
        assert row["growth"]["lengths"] == pytest.approx([0.05] * 6, rel=1e-5)


def test_refusals_read_well(engine):
    for row in engine[0]:
        assert row["refusals"] == [
            'this engine also clips: its "gradient_clipping" is 1 (DeepSpeed sets it where a '
            'config does not). Write "gradient_clipping": '
            "0.0 into the DeepSpeed config, or attach(engine, ..., take_over=True)",
            "attach(engine, ..., fold=): DeepSpeed decides that; the options are norm_type, "
            "groups, on_nonfinite, drift_tolerance, "
            "skip_limit, sinks",
            "groups is a dict; pass distclip.by_name({pattern: threshold or policy}), "
            "per_parameter(), per_layer() or per_param_group(optimizer)",
            "0.0",
            "this engine has a clipper already; attach one only",
        ]


def test_another_version_of_deepspeed_is_told_by_name(engine):
    rows, _, name = engine
    at_zero = (
        "FP16_Optimizer.fp16_groups"
        if "fused" in name
        else "FP16_UnfusedOptimizer.fp16_groups"
        if "fp32" not in name
        else ""
    )
    lost = {
        "0": at_zero,
        "1": "BF16_Optimizer.bf16_groups"
        if "fp32acc" in name
        else "DeepSpeedZeroOptimizer.averaged_gradients",
        "2": "DeepSpeedZeroOptimizer.averaged_gradients",
        "3": "DeepSpeedZeroOptimizer_Stage3.averaged_gradients",
    }[name[0]]
    for row in rows:
        assert row["missing"] == [
            f"DeepSpeed X has no {what}, which distclip needs; it was written against DeepSpeed "
            f"0.19"
            for what in (lost, "DeepSpeedEngine.torch_autocast_z0_gradscaler")
            if what
        ]


def test_what_cannot_be_clipped_is_refused(engine):
    rows, _, name = engine
    stranger = (
        "the engine's optimizer steps a parameter of shape (3,) that is not in the model; put it "
        "into the model that "
        "deepspeed.initialize gets"
    )
    unmeasured = (
        'attach: this engine has "zero_optimization": {"compute_grad_norm": false}, which distclip '
        "does not support under DeepSpeed: "
        "leave that out"
    )
    sliced = (
        "attach: this engine has a model-parallel mpu, which distclip does not support under "
        'DeepSpeed: leave attach out and let DeepSpeed clip ("gradient_clipping": 1.0 in its '
        "config), or train such a model under FSDP2 with its experts or tensor-parallel parts as "
        "torch has them, where GradClipper(model, ...) knows them"
    )
    sharded = name[0] in "12" and "fp32acc" not in name and "offload" not in name
    for row in rows:
        assert row["unsupported"] == [sliced] + (
            [stranger] if name[0] == "0" else [unmeasured] if sharded else []
        )
