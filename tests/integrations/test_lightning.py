"""Lightning's Trainer with the callback, and Fabric, against a float64 oracle in one process."""

import pytest

from integrations.launched import assert_as_the_oracle, launched

pytest.importorskip("lightning")

LAYOUTS = {"single": 0, "ddp": 2, "fsdp2": 2}


@pytest.fixture(scope="module", params=LAYOUTS)
def rows(request):
    return launched("lightning_loop.py", request.param, ranks=LAYOUTS[request.param])


@pytest.mark.parametrize(
    "case",
    [
        "clip",
        "tiny",
        "huge",
        "accumulate",
        "groups",
        "part",
        "fabric clip",
        "fabric tiny",
        "fabric huge",
    ],
)
def test_the_update_is_the_oracles(rows, case):
    *fabric, case = case.split()
    for row in rows:
        seen = (row["fabric"] if fabric else row)[case]
        assert seen["norm"] > 0.1, "vacuous"
        assert seen["off"] <= 1e-6 and seen["norm_off"] <= 1e-6
        assert seen["calls"] == 1
        assert seen.get("returned", True)
        assert {"huge": seen["moved"] > 0.1, "tiny": seen["moved"] < 1e-8}.get(case, True)
    assert len({(row["fabric"] if fabric else row)[case]["bits"] for row in rows}) == 1


def test_elements_are_bounded_by_fabric(rows):
    assert all(row["fabric"]["value"]["off"] <= 1e-6 for row in rows)


def test_norm_and_coefficient_are_logged(rows):
    for row in rows:
        assert row["clip"]["logged"]["grad_norm"] == pytest.approx(row["clip"]["norm"], rel=1e-6)
        assert row["clip"]["logged"]["clip_coef"] == pytest.approx(
            0.1 / row["clip"]["norm"], rel=1e-6
        )


def test_two_optimizers_are_clipped_by_norms_of_their_own(rows):
    if "two" not in rows[0]:
        pytest.skip("shown under one process and DDP")
    for row in rows:
        for seen in row["two"].values():
            assert seen["norm"] > 0.1, "vacuous"
            assert seen["off"] <= 1e-6


def test_the_state_goes_with_the_checkpoint(rows):
    if "resumed" not in rows[0]:
        pytest.skip("shown under one process and DDP")
    assert all(row["resumed"] == {"before": 2, "after": 3} for row in rows)


def test_fp16_is_unscaled_once(rows):
    if "fp16" not in rows[0]:
        pytest.skip("Lightning's fp16 with FSDP2 is for GPUs")
    for row in rows:
        for case in ("fp16", "fp16 fused"):
            assert (
                row[case]["off"] <= 5e-3
                and row[case]["norm_off"] <= 5e-3
                and row[case]["scale"] == 1024
            )
        assert row["fp16 bad"]["moved"] == 0 and row["fp16 bad"]["scale"] == 512


def test_fabric_clips_what_each_optimizer_steps(rows):
    if "by_parts" not in rows[0]:
        pytest.skip("shown under one process and DDP")
    for row in rows:
        assert row["by_parts"].pop("scale") == 1024
        for seen in row["by_parts"].values():
            assert seen["norm"] > 0.1, "vacuous"
            assert seen["off"] <= 5e-3 and seen["norm_off"] <= 5e-3


@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
def test_a_search_is_clipped_as_lightning_clips_it(rows, search):
    if search not in rows[0].get("searches", {}):
        pytest.skip(
            "shown under one process and DDP; Lightning scales batches in one process alone"
        )
    for row in rows:
        seen = row["searches"][search]
        assert len(seen["distclip"]) >= 2 and min(seen["neither"]) > 1, "vacuous"
        assert seen["distclip"] == pytest.approx(seen["lightning"], rel=1e-5)


def test_a_search_leaves_the_fits_clipper_as_it_was(rows):
    if "searches" not in rows[0]:
        pytest.skip("shown under one process and DDP")
    for row in rows:
        seen = row["searches"]
        names = {"at its start", "inside", "after a search of batch sizes"} & seen.keys()
        assert len(names) >= 2
        for name in names:
            assert seen[name]["steps"] > seen["none"]["steps"] == 3, "vacuous"
            assert seen[name]["state"] == seen["none"]["state"], name
            assert seen[name]["sink"] == 3
        # a LearningRateFinder makes Lightning count its steps from 0 again, and reads the
        # checkpoint's callbacks anew
        saved = seen["none"]["state"]
        for resumed, steps in ((seen["resumed none"], 2), (seen["resumed with a finder"], 5)):
            assert resumed["step"] == saved["step"] + steps
            assert resumed["0.0"][0][:3] == saved["0.0"][0][:3]


def test_what_the_optimizer_holds_at_the_step_counts(rows):
    if "fine_tuning" not in rows[0]:
        pytest.skip("DDP does not reduce what is unfrozen after it was built")
    for row in rows:
        seen = row["fine_tuning"]
        assert seen["told"] == pytest.approx(seen["held"], rel=1e-6)
        assert seen["held"][2] > seen["held"][1] + 0.003, (
            "vacuous: nothing was given to the optimizer"
        )
        assert seen["all"][-1] > 4 * seen["held"][-1], (
            "vacuous: no gradient was left that nobody steps"
        )


def test_fabric_counts_what_the_optimizer_holds(rows):
    if "fabric_holds" not in rows[0]:
        pytest.skip("shown under one process and DDP")
    for row in rows:
        seen = row["fabric_holds"]
        for exact, told in seen["seen"]:
            assert told == pytest.approx(exact, rel=1e-6)
        assert seen["seen"][2][0] > seen["seen"][1][0] > 0.1, "vacuous"
        assert seen["calls"] == [3, 1]
        assert seen["texts"] == [
            "clip_gradients: the optimizer holds 1 parameters of other modules, which Fabric would "
            "clip with these; prepare all its "
            "modules together: prepare(fabric, module, other, max_norm=...)",
            "clip_gradients: a second optimizer steps another part of the module, which has no "
            "policy of its own; prepare the module with "
            "max_norm=, or each part as a module",
        ]


def test_each_fit_is_clipped_once_and_none_without_the_callback(rows):
    if "fits" not in rows[0]:
        pytest.skip("shown under one process and DDP")
    for row in rows:
        norm = row["fits"]["norm"]
        assert norm > 0.1, "vacuous"
        for (length, calls, left), wanted in zip(
            row["fits"]["seen"], (0.1, 0.1, norm), strict=True
        ):
            assert length == pytest.approx(wanted, rel=1e-6)
            assert calls == 1 and left == []


def test_refusals_read_well(rows):
    twice = (
        "ClipsByHand calls self.clip_gradients(gradient_clip_val={}) and GradientClipping clips "
        "too: the norm that is measured second is "
        "that of clipped gradients. Take the call out, and give GradientClipping(max_norm=...) its "
        "threshold "
        "(policy=distclip.FixedValue(...) for gradient_clip_algorithm='value')"
    )
    for row in rows:
        assert row["both"] == [
            "Trainer(gradient_clip_val=0.5) clips too; leave it out, "
            "GradientClipping(max_norm=...) is enough",
            "ClipsToo.configure_gradient_clipping may clip too; take it out: GradientClipping is "
            "enough",
            twice.format(0.25),
            twice.format(0.5),
            "this Trainer has two GradientClipping callbacks; pass one, it clips every optimizer",
            "grad_of=: Lightning steps what is in .grad; use GradClipper itself for gradients that "
            "are elsewhere",
        ]
        assert row["fabric"]["texts"] == [
            "clip_gradients was called with max_norm=0.5, norm_type=2, but distclip was prepared "
            "with max_norm=1000000000.0, norm_type=2; "
            "make them equal",
            "clip_gradients: distclip does not know this module; call prepare(fabric, module, "
            "max_norm=...) for it",
            "clip_gradients: pass exactly one of clip_val and max_norm",
            "prepare(fabric, module, max_norm=...) needs the module that fabric.setup returned",
            "the norm of the gradients is nan; nothing was stepped (error_if_nonfinite=True)",
        ]


@pytest.fixture(scope="module")
def mesh_rows():
    return launched("lightning_mesh_loop.py", ranks=4)


@pytest.mark.parametrize(
    "case",
    [
        "the whole in the plan",
        "a layer outside the plan",
        "nothing in the plan",
        "fabric, a layer outside the plan",
        "fabric, nothing in the plan",
    ],
)
def test_the_update_beside_tensor_parallelism_is_the_oracles(mesh_rows, case):
    assert_as_the_oracle(mesh_rows, case)
    assert all(row[case].get("bounded", 1) > 0 for row in mesh_rows), "vacuous"


def test_lightnings_own_clip_takes_one_mesh(mesh_rows):
    for row in mesh_rows:
        for case in ("the whole in the plan", "nothing in the plan"):
            assert row[case]["own"] <= 1e-5  # its coefficient is c / (n + 1e-6)
        own = row["a layer outside the plan"]["own"]
        assert "same mesh" in own if isinstance(own, str) else own <= 1e-5
