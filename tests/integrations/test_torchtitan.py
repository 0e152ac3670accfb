"""torchtitan's packaged debug models: distclip's one line beside torchtitan's own clipping, and both
beside the norm of whole gradients in float64."""

import math

import pytest
import torch

from integrations.launched import assert_passed, launched

pytest.importorskip("torchtitan", reason="torchtitan is not installed: launch/programs.sh does")

# as torch 2.13 can run them: spmd_backend="partial_dtensor"; the others ask for a later FSDP2
LAYOUTS = {
    "fsdp2": 2,
    "tp": 2,
    "fsdp2_tp": 4,
    "pp_fsdp2": 4,
    "moe_ep": 2,
}
SEEN = {}


def rows_of(layout):
    if layout not in SEEN:
        SEEN[layout] = launched("torchtitan_loop.py", layout, ranks=LAYOUTS[layout])
    return SEEN[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_norms_are_the_originals(layout):
    for row in rows_of(layout):
        own, ours = row["steps"]["own"], row["steps"]["ours"]
        assert len(own["losses"]) == len(ours["losses"]) == 12
        assert ours["losses"] == pytest.approx(own["losses"], rel=1e-6)
        # torch's norm of float32 on a CPU is that far off; distclip's is not
        assert ours["norms"] == pytest.approx(own["norms"], rel=2e-4)
        assert ours["norms"] == pytest.approx(ours["exact"], rel=2e-7)
        assert row["steps"]["calls"] == 12
    rows = rows_of(layout)
    assert min(rows[0]["steps"]["ours"]["norms"]) > 1, "vacuous: nothing is clipped"
    assert max(len(set(row["steps"]["ours"]["losses"])) for row in rows) > 6, "vacuous"
    assert len({tuple(row["steps"]["ours"]["norms"]) for row in rows}) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_log_tells_what_clipping_did(layout):
    for row in rows_of(layout):
        ours = row["steps"]["ours"]
        for norm, extra in zip(ours["norms"], ours["extra"], strict=True):
            assert extra["distclip/clip_coef"] == pytest.approx(0.5 / norm, rel=1e-6)
            assert (extra["distclip/clip_rate"], extra["distclip/skips"]) == (1.0, 0)
        assert not any(row["steps"]["own"]["extra"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_release_leaves_the_trainer_as_it_was(layout):
    assert all(row["steps"]["restored"] for row in rows_of(layout))


def test_experts_are_balanced_as_in_the_original_and_not_at_a_skipped_step():
    for row in rows_of("moe_ep"):
        own, ours = row["steps"]["own"]["biases"], row["steps"]["ours"]["biases"]
        assert own[0] != own[-1], "vacuous"
        assert ours == own
        skipped = row["skipped"]["biases"]
        assert skipped[3] != skipped[4], "vacuous"
        assert skipped[4] == skipped[5] != skipped[6]


def test_inf_on_one_rank_ends_the_original_and_leaves_out_one_step_here():
    for row in rows_of("fsdp2"):
        own, without, ours = (row["not_finite"][name] for name in ("own", "without", "ours"))
        assert own["ended"].startswith("step 6: Loss is not finite")
        assert ours["ended"] is None and math.isinf(ours["norms"][4])
        assert ours["losses"] == pytest.approx(without["losses"], rel=1e-6)
        assert row["not_finite"]["skips"] == 1
        assert ours["extra"][4]["distclip/skips"] == 1


def test_a_learned_threshold_resumes_with_the_trainers_checkpoint():
    for row in rows_of("fsdp2"):
        seen = row["resumed"]
        assert seen["resumed"] == seen["straight"][6:]
        assert seen["equal"] and seen["step"] == 12


def test_the_override_needs_no_line_of_code():
    for row in rows_of("fsdp2"):
        seen = row["by_override"]
        assert seen["attached"]
        assert seen["ours"]["losses"] == row["steps"]["ours"]["losses"]
        assert seen["ours"]["norms"] == row["steps"]["ours"]["norms"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_the_doctor_compares_its_smallest_training(device):
    if device == "gpu" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    [seen] = launched("doctor_jobs.py", device, "torchtitan", ranks=0)
    assert_passed(seen["torchtitan"], {"norm": "pass", "own": "pass"})
    assert "5 steps, 5 clipped" in seen["torchtitan"]["right"]["seen"]["norm"]
    loose = seen["torchtitan"]["loose"]
    assert loose["code"] == 1 and loose["results"] == {"norm": "pass", "own": "fail"}


def test_refusals_read_well():
    for row in rows_of("fsdp2"):
        twice, gradients, threshold, lacks, unclipped = row["refused"]
        assert twice == "this trainer is clipped by distclip already; attach it once"
        assert gradients.startswith(
            "grad_of= cannot be honoured: torchtitan steps what is in .grad"
        )
        assert threshold == (
            "training.max_norm was 0.5 when distclip was attached and is now 3; for a threshold "
            "that changes pass policy=distclip.Scheduled(...)"
        )
        assert lacks == (
            "torchtitan 0.3.0: Trainer has no metrics_processor.log, which distclip needs; it was "
            "written against torchtitan 0.3.0"
        )
        assert unclipped == (
            "train_step of Trainer does not call dist_utils.clip_grad_norm_, whose place distclip "
            "takes; call clipper.step(self.optimizers) there instead"
        )
