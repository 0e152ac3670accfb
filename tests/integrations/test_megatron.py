"""Megatron-Core's optimizers with distclip in their step, beside their own clipping on the same
shards, against a float64 oracle in one process."""

from functools import cache
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist

from integrations import megatron_cases as cases
from integrations.launched import assert_passed, launched

pytestmark = pytest.mark.skipif(
    find_spec("megatron") is None or find_spec("megatron.core") is None,
    reason="megatron-core is not installed",
)
BOUNDS = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 3e-2}  # the rounding of gradients


def assert_right(rows, bound):
    """Megatron's own and distclip's are both the oracle's; distclip's with one all-reduce."""
    for row in rows:
        assert row["norm"] > 5 * cases.MAX_NORM, "vacuous"
        for whose in ("own", "ours"):
            seen = row[whose]
            assert seen["done"]
            assert seen["norm"] == pytest.approx(row["norm"], rel=bound)
            assert seen["off"] <= bound
        assert row["ours"]["reduces"] == 1 <= row["own"]["reduces"]
    assert sum(row["ours"]["count"] for row in rows) > 0, "vacuous"
    assert len({row["ours"]["bits"] for row in rows}) == 1


@pytest.mark.parametrize("distributed", [False, True], ids=["whole", "distributed_optimizer"])
@pytest.mark.parametrize("low", ["fp32", "bf16", "fp16"])
def test_tensor_parallel(ranks, low, distributed):
    rows = ranks.run(cases.tensor_parallel, low, distributed)
    assert_right(rows, BOUNDS[low])
    copies = {n for row in rows for n in row["ours"]["copies"]}
    # of the norm and of the row layer's bias there are two over tensor-parallel ranks
    assert copies == ({1, 2} if distributed else {2, 4})


def test_a_mark_that_is_lost_is_found(ranks):
    """Megatron's own norm leaves out what other ranks hold of the weight, and nothing tells."""
    rows = ranks.run(cases.lost_mark)
    for row in rows:
        assert row["own"] < 0.99 * row["norm"]
    told = rows[0]["ours"]
    assert "gradients that should be copies are not equal" in told and "column.weight [" in told


@cache
def rows_of_experts(ranks, low, distributed):
    return ranks.run(cases.experts, low, distributed)


@pytest.mark.parametrize("distributed", [False, True], ids=["whole", "distributed_optimizer"])
@pytest.mark.parametrize("low", ["fp32", "fp16", "bf16"])
def test_experts_of_chained_optimizers(ranks, low, distributed):
    rows = rows_of_experts(ranks, low, distributed)
    assert_right(rows, BOUNDS[low])
    assert all(len(row["own"]["scales"]) == 2 for row in rows), "vacuous: not chained"
    names = {name for row in rows for name in row["ours"]["pieces"]}
    assert any("ep 0" in name for name in names) and any("ep 1" in name for name in names)


@pytest.mark.parametrize("low", ["fp32", "fp16", "bf16"])
def test_what_is_not_finite_in_one_expert_is_left_out_everywhere(ranks, low):
    """Megatron's own steps it into the weights unless a loss scale is there; and then the scales of
    its chained optimizers part."""
    for row in rows_of_experts(ranks, low, True):
        ours, own = row["ours"], row["own"]
        assert not ours["bad_done"] and not ours["bad_moved"]
        if low == "fp16":
            assert ours["scales"] == [8.0, 8.0]
            assert not own["bad_done"] and own["scales"][0] != own["scales"][1]
        else:
            assert own["bad_done"] and own["bad_moved"]


@pytest.mark.parametrize("distributed", [False, True], ids=["whole", "distributed_optimizer"])
def test_an_embedding_tied_over_stages_counts_once_and_is_clipped_twice(ranks, distributed):
    rows = ranks.run(cases.pipeline, distributed)
    assert_right(rows, BOUNDS["fp32"])
    assert any("copy" in name for row in rows for name in row["ours"]["pieces"]), "vacuous"


def test_marked_parameters_have_a_norm_of_their_own(ranks):
    rows = ranks.run(cases.norms_of_their_own, "marks")
    by_name = rows[0]["by_name"]
    marked = cases.norm_of(torch.tensor(v) for n, v in by_name.items() if "norm." in n)
    main = cases.norm_of(torch.tensor(v) for n, v in by_name.items() if "norm." not in n)
    for row in rows:
        ours, own = row["ours"], row["own"]
        assert marked > cases.MAX_NORM and main > cases.MAX_NORM, "vacuous"
        assert ours["told"] == pytest.approx(main, rel=1e-5)
        assert ours["others"] == {"mtp": pytest.approx(marked, rel=1e-5)}
        if row["they_have_groups"]:
            assert own["told"] == pytest.approx(main, rel=1e-5)
            assert own["others"] == {"mtp": pytest.approx(marked, rel=1e-5)}
            assert ours["marked"] == pytest.approx(own["marked"], rel=1e-4)


def test_a_group_is_a_parameter_whole_over_all_ranks(ranks):
    for row in ranks.run(cases.norms_of_their_own, "each"):
        assert row["ours"]["groups"] == {
            name: pytest.approx(norm, rel=1e-5) for name, norm in row["by_name"].items()
        }


def test_a_spike_is_left_out_and_lowers_no_loss_scale(ranks):
    for row in ranks.run(cases.spikes):
        assert row["done"] == [True, True, True, False, True] == row["moved"]
        assert row["told"][3] > 20 * row["told"][2] > 0
        assert row["scales"] == [16.0] * 5


def test_refusals_and_detach(ranks):
    for row in ranks.run(cases.refusals):
        clips, option, kind, foreign, groups, uneven, fine, twice, nothing = row["texts"]
        assert "this optimizer also clips: clip_grad of its OptimizerConfig is 1" in clips
        assert "attach(optimizer, model, ..., fold=): the options are" in option
        assert "the optimizer is a AdamW; distclip knows DistributedOptimizer" in kind
        assert "that is not in the model; pass all chunks of the model" in foreign
        assert "Megatron's process groups are not initialised" in groups
        assert "tensor-parallel ranks lay out copies differently" in uneven
        assert fine == ""
        assert "has a clipper already" in twice
        assert "this optimizer has no clipper" in nothing
        assert len(row["features"]) >= 2
        assert all(
            f"has {name}" in text and "which distclip does not support under Megatron" in text
            for name, text in row["features"]
        )
        assert row["detached"] and row["clip_grad"] == [0.0, 1.0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_the_doctor_compares_its_smallest_training(device):
    if device == "gpu" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    [seen] = launched("doctor_jobs.py", device, "megatron", ranks=0)
    assert_passed(seen["megatron"], {"norm": "pass", "weights": "pass", "own": "pass"})
    loose = seen["megatron"]["loose"]
    assert loose["code"] == 1
    assert loose["results"]["weights"] == "fail" and loose["results"]["own"] == "pass"


@pytest.mark.gpu
@pytest.mark.parametrize("distributed", [False, True], ids=["whole", "distributed_optimizer"])
@pytest.mark.parametrize("low", ["fp32", "bf16", "fp16"])
def test_on_a_gpu(tmp_path, low, distributed):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    dist.init_process_group(
        "nccl", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1)
    )
    try:
        assert_right([cases.tensor_parallel(low, distributed, size=1)], BOUNDS[low])
    finally:
        dist.destroy_process_group()
