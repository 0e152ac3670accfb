"""Lightning's Trainer with the callback, and Fabric, against a float64 oracle in one process."""

import pytest

from integrations.launched import launched

pytest.importorskip("lightning")

LAYOUTS = {"single": 0, "ddp": 2, "fsdp2": 2}


@pytest.fixture(scope="module", params=LAYOUTS)
def rows(request):
    return launched("lightning_loop.py", request.param, ranks=LAYOUTS[request.param])


@pytest.mark.parametrize("case", ["clip", "tiny", "huge", "accumulate", "groups", "part", "fabric clip", "fabric tiny", "fabric huge"])
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
        assert row["clip"]["logged"]["clip_coef"] == pytest.approx(0.1 / row["clip"]["norm"], rel=1e-6)


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
            assert row[case]["off"] <= 5e-3 and row[case]["norm_off"] <= 5e-3 and row[case]["scale"] == 1024
        assert row["fp16 bad"]["moved"] == 0 and row["fp16 bad"]["scale"] == 512


def test_fabric_clips_what_each_optimizer_steps(rows):
    if "by_parts" not in rows[0]:
        pytest.skip("shown under one process and DDP")
    for row in rows:
        assert row["by_parts"].pop("scale") == 1024
        for seen in row["by_parts"].values():
            assert seen["norm"] > 0.1, "vacuous"
            assert seen["off"] <= 5e-3 and seen["norm_off"] <= 5e-3


def test_refusals_read_well(rows):
    for row in rows:
        assert row["both"] == [
            "Trainer(gradient_clip_val=0.5) clips too; leave it out, GradientClipping(max_norm=...) is enough",
            "ClipsToo.configure_gradient_clipping may clip too; take it out: GradientClipping is enough",
            "grad_of=: Lightning steps what is in .grad; use GradClipper itself for gradients that are elsewhere",
        ]
        assert row["fabric"]["texts"] == [
            "clip_gradients was called with max_norm=0.5, norm_type=2, but distclip was prepared with max_norm=1000000000.0, norm_type=2; "
            "make them equal",
            "clip_gradients: distclip does not know this module; call prepare(fabric, module, max_norm=...) for it",
            "clip_gradients: pass exactly one of clip_val and max_norm",
            "prepare(fabric, module, max_norm=...) needs the module that fabric.setup returned",
            "the norm of the gradients is nan; nothing was stepped (error_if_nonfinite=True)",
        ]
