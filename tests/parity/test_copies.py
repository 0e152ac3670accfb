"""Which parameters of equal names are copies: on meshes that others join, tied, private, and what
only a declaration tells."""

import re
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from distclip.testing import count_collectives, fully_shard
from parity.layouts import given, mesh, twins
from parity.oracle import NORMS, total_norm
from setup.test_refusals import refusal


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def net():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(drawn(i, *p.shape))
    return model


@cache
def grid():
    """FSDP1 knows tensor parallelism by the mesh around its own, which must be one of two
    dimensions that it is given a part of."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def beside_tp(wrapper):
    """Layer norms in no tensor-parallel plan, under data parallelism over the other dimension."""
    on, over = (
        (grid()["tp"], grid()["dp"])
        if wrapper == "fsdp1"
        else (mesh(2, 2)["inner"], mesh(2, 2)["outer"])
    )
    model = parallelize_module(net(), on, {"1": ColwiseParallel(), "2": RowwiseParallel()})
    if wrapper == "fsdp2":
        return fully_shard(model, mesh=over)
    if wrapper == "fsdp1":
        return FullyShardedDataParallel(
            model, device_mesh=over, use_orig_params=True, device_id=torch.device("cpu")
        )
    return DDP(model, device_mesh=mesh(2, 2)["outer"])


def oracle():
    """Of two batches, one for each data-parallel rank."""
    model = net().double()
    for which in range(2):
        (model(drawn(50 + which, 4, 8).double()).square().sum() / 2).backward()
    return dict(model.named_parameters())


def backward(model):
    model(drawn(50 + dist.get_rank() // 2, 4, 8)).square().sum().backward()


def norms(wrapper, p):
    model, clean = beside_tp(wrapper), oracle()
    whole = total_norm([q.grad for q in clean.values()], p)
    clippers = [
        distclip.GradClipper(model, whole / 2, norm_type=p, groups=groups)
        for groups in (None, distclip.per_parameter())
    ]
    of_params = None if wrapper == "fsdp1" else clippers[0].measure(of="param").total_norm.item()
    backward(model)
    each = clippers[1].measure()
    with count_collectives() as seen:
        report = clippers[0].clip_()
    wanted = [total_norm([clean[name].grad], p) for name in each.groups]
    return (
        (report.total_norm.item(), whole),
        (of_params, of_params and total_norm([q.detach() for q in clean.values()], p)),
        *zip(each.group_norms.tolist(), wanted),
    ), (report.clip_coef.item(), seen.names, str(clippers[0].plan))


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("wrapper", ["fsdp2", "fsdp1", "ddp"])
def test_what_no_plan_names_counts_once(ranks, wrapper, p):
    found = ranks.run(norms, wrapper, p)
    for pairs, (coef, seen, plan) in found:
        for norm, want in pairs:
            assert norm == (None if want is None else pytest.approx(want, rel=1e-5))
        assert coef == pytest.approx(0.5, rel=1e-5) and seen == ["allreduce_"]
        placed = {
            "fsdp2": "Shard(0) on a 2 mesh",
            "fsdp1": "FSDP1 shard, 2 parts",
            "ddp": "whole, in DDP",
        }[wrapper]
        copies = 4 if wrapper == "ddp" else 2
        assert re.search(rf"\n +4 +32  {re.escape(placed)} +0-3 +{copies}\n", plan), (
            f"one row for the four parameters of the norms: {plan}"
        )
    assert len({(pairs[0][0].hex(), rest[0].hex()) for pairs, rest in found}) == 1


def drifted(wrapper):
    """One copy of a layer norm's gradient differs: found at the step, and where only its sign does,
    by the audit."""
    model = beside_tp(wrapper)
    clipper = distclip.GradClipper(model, 1.0)
    params = dict(model.named_parameters())
    backward(model)
    bias = next(p for name, p in params.items() if name.endswith("3.bias"))
    grad = bias.grad.to_local() if wrapper == "fsdp2" else bias.grad
    if dist.get_rank() == 1:
        grad.neg_()
    clipper.measure()
    audited = refusal(clipper.audit)
    if dist.get_rank() == 1:
        grad.mul_(2)
    return audited, refusal(clipper.clip_), refusal(lambda: clipper.measure(of="param"))


@pytest.mark.parametrize("wrapper", ["fsdp2", "ddp"])
def test_their_drift_is_found(ranks, wrapper):
    usual = "0" if wrapper == "fsdp2" else "0,2-3"
    for audited, stepped, of_params in ranks.run(drifted, wrapper):
        refused = (
            r"AgreementError: step 3: gradients that .*\n3.bias: norm \S+{0} on rank {1}, "
            r"norm \S+{0} on rank 1\nIf"
        )
        assert re.search(refused.format("", usual), stepped)
        assert re.search(
            refused.format(r" with signed sum \S+", usual).replace("step 3", "step 2"), audited
        )
        assert of_params is None


def flat_parameters_of_parts_and_copies():
    model = parallelize_module(
        net(), grid()["tp"], {"1": ColwiseParallel(), "2": RowwiseParallel()}
    )
    model = FullyShardedDataParallel(
        model, device_mesh=grid()["dp"], use_orig_params=False, device_id=torch.device("cpu")
    )
    return refusal(lambda: distclip.GradClipper(model, 1.0))


def test_flat_parameters_of_parts_and_copies_are_refused(ranks):
    for text in ranks.run(flat_parameters_of_parts_and_copies):
        assert (
            text.startswith("PlacementError: FSDP1 has put 0.weight, 0.bias, 1.weight")
            and "use_orig_params=True" in text
        )


def beside_a_base_of_whole_numbers(whole_model):
    """A quantised base has no gradients, and its mesh still says that the ranks work on one
    model."""
    on = init_device_mesh("cpu", (1, 4), mesh_dim_names=("dp", "tp"))
    base = nn.Parameter(
        distribute_tensor(
            torch.ones(8, 4, dtype=torch.int8), on["tp"], [Shard(0)], src_data_rank=None
        ),
        False,
    )
    model = nn.Module()
    model.base, model.lora = base, given("lora", 4, 3, on=on["dp"], place=[Shard(0)])[1]
    plan = distclip.GradClipper(model if whole_model else [("lora", model.lora)], 1.0)
    return (
        plan.measure().total_norm.item(),
        str(plan.plan),
        total_norm([given("lora", 4, 3)[1].grad]),
    )


def test_a_quantised_base_joins_its_ranks(ranks):
    for norm, plan, want in ranks.run(beside_a_base_of_whole_numbers, True):
        assert norm == pytest.approx(want, rel=1e-6) and "joins" not in plan


def test_what_nothing_joins_is_told(ranks):
    """Without the base nobody can know whether these are copies or stages: they are different, and
    the plan says so."""
    for norm, plan, want in ranks.run(beside_a_base_of_whole_numbers, False):
        assert norm == pytest.approx(2 * want, rel=1e-6)
        assert (
            "\n1 name on ranks that no parameter's mesh joins: taken for different parameters "
            "there (pipeline stages); if they are" in plan
        )


# Experts under one name


def undeclared_experts():
    here = dist.get_rank() % 2
    params = [given("dense", 6, 4, on=mesh(4), place=[Shard(0)])]
    params.append(
        ("expert", given(f"expert{here}", 4, 3, on=mesh(2, 2)["outer"], place=[Shard(0)])[1])
    )
    return refusal(lambda: distclip.GradClipper(params, 1.0).clip_())


def test_different_experts_under_one_name_are_refused_with_the_declaration(ranks):
    for text in ranks.run(undeclared_experts):
        assert re.search(
            r"AgreementError: step 1: .*\nexpert: norm \S+ on rank 0, norm \S+ on "
            r"rank 1\n",
            text,
        ), text
        assert "declare replicated_over={pattern: process group | distclip.PRIVATE}" in text


# Tied and private


def stages(options, placed):
    """Two stages of two ranks each; an embedding tied over both, all else the stage's own."""
    stage = dist.get_rank() // 2
    place = {"on": mesh(2, 2)["inner"], "place": [Shard(0)]} if placed else {}
    named = [(("embed.weight", "head.weight")[stage], given("tied", 8, 3, **place)[1])]
    named.append((f"{stage}.body", given(f"{stage}.body", 6, **place)[1]))
    if options == "of each":
        over = {"embed.weight": distclip.PRIVATE, "?.body": twins()}
    elif options == "by group":
        over = {"*": twins()}
    else:
        over = {"*.weight": distclip.PRIVATE, "?.body": twins()}
    whole = [given("tied", 8, 3)[1].grad, *(given(f"{s}.body", 6)[1].grad for s in (0, 1))]
    want = total_norm(whole)
    clipper = distclip.GradClipper(
        named, want / 2, replicated_over=over, shared=(("embed.weight", "head.weight"),)
    )
    report = clipper.clip_()
    return report.total_norm.item(), want, report.clip_coef.item()


@pytest.mark.parametrize("placed", [False, True], ids=["whole", "sharded in each stage"])
@pytest.mark.parametrize("options", ["of all", "of each", "by group"])
def test_what_is_shared_is_held_by_all_that_have_a_name_of_it(ranks, options, placed):
    for norm, want, coef in ranks.run(stages, options, placed):
        assert norm == pytest.approx(want, rel=1e-6) and coef == pytest.approx(0.5, rel=1e-6)


def private_to_every_rank():
    """Everything is private by one pattern, but for what is tied; three names of one parameter, two
    of them on one rank."""
    rank = dist.get_rank()
    names = {0: ["embed"], 1: [], 2: ["first_head", "second_head"], 3: ["second_head"]}[rank]
    named = [(name, given("tied", 5)[1]) for name in names] + [("own", given(f"own{rank}", 4)[1])]
    want = total_norm([given("tied", 5)[1].grad, *(given(f"own{r}", 4)[1].grad for r in range(4))])
    shared = (("embed", "first_head", "second_head"),)
    return distclip.GradClipper(
        named, 1.0, replicated_over={"*": distclip.PRIVATE}, shared=shared
    ).clip_().total_norm.item(), want


def test_private_by_pattern_and_shared_by_name(ranks):
    for norm, want in ranks.run(private_to_every_rank):
        assert norm == pytest.approx(want, rel=1e-6) and norm > 1


def tied_and_placed_in_other_ways():
    """A row-sharded embedding's gradient is replicated, the tied head's is sharded: equal norms,
    and no copies piece by piece."""
    stage, over, whole = dist.get_rank() // 2, mesh(2, 2)["inner"], drawn(4, 8, 6)
    param = nn.Parameter(distribute_tensor(torch.zeros(8, 6), over, [Shard(0)], src_data_rank=None))
    param.grad = distribute_tensor(
        whole.clone(), over, [Shard(0) if stage else Replicate()], src_data_rank=None
    )
    named = [(("embed.weight", "head.weight")[stage], param)]
    clipper = distclip.GradClipper(named, 1.0, shared=(("embed.weight", "head.weight"),))
    audited = refusal(clipper.audit)
    return audited, clipper.clip_().total_norm.item(), total_norm([whole])


def test_tied_gradients_placed_in_other_ways_are_no_drift(ranks):
    for audited, norm, want in ranks.run(tied_and_placed_in_other_ways):
        assert audited is None and norm == pytest.approx(want, rel=1e-6) and norm > 1
