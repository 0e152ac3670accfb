"""Each rank's own norm before the reduction, beside a float64 oracle of one process, and the rank
that it gives away."""

import json
import math
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from distclip.testing import count_collectives, fully_shard
from late import judged_late
from parity.layouts import Pair, factor, mesh, pair_grads
from parity.oracle import total_norm
from precision.test_waiting import NoHostReads

INF, NAN = math.inf, math.nan
needs_fsdp2 = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_custom_reduce_scatter"), reason="a release that shows nothing"
)


def ddp(model, **options):
    return DDP(model, **options)


def fsdp2(model, on=None):
    for part in (model.first, model.second, model):
        fully_shard(part, mesh=on or mesh(4))
    return model


def hsdp(model):
    return fsdp2(model, mesh(2, 2))


def one_unit(model):
    """Of two modules."""
    fully_shard([model.first, model.second], mesh=mesh(4))
    fully_shard(model, mesh=mesh(4))
    return model


WRAPPERS = {"ddp": ddp, "fsdp2": fsdp2, "hsdp": hsdp, "one unit": one_unit}


def unsynchronised(model, yes):
    """FSDP2's way to say `no_sync`."""
    if isinstance(model, DDP):
        model.require_backward_grad_sync = not yes
    else:
        model.set_requires_gradient_sync(not yes)


def own_norms(wrapper, p, dtype, micro_steps, scale, late):
    """Two steps; of the second: what the report says, and what this rank's own gradients are."""
    model = WRAPPERS[wrapper](Pair().to(dtype))
    rank_norms = distclip.RankNorms(model)
    clipper = distclip.GradClipper(model, INF, norm_type=p, rank_norms=rank_norms)
    judged_late(clipper, late)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
    for _ in range(2):
        optimizer.zero_grad()
        for micro_step in range(micro_steps):
            unsynchronised(model, micro_step < micro_steps - 1)
            scaler.scale(model(factor().to(dtype))).backward()
        again = clipper.measure() if scale == 1 else None
        with count_collectives() as seen:
            report = clipper.step(optimizer, scaler=scaler, grad_scale=0.5)
    norms = report.rank_norms.tolist()
    assert again is None or (2 * report.rank_norms).equal(again.rank_norms)
    assert clipper.measure(of="param").rank_norms.numel() == 0
    own = [g.double() * micro_steps * factor().item() / 2 for g in pair_grads()]
    return norms, total_norm(own, p), report.total_norm.item(), seen.names


OWN = [(w, how, p) for w in WRAPPERS for how in ("plain", "float16") for p in (1.0, 2.0, INF)]
OWN += [
    (w, how, 2.0)
    for w in ("ddp", "fsdp2", "hsdp")
    for how in ("accumulated", "scaled", "late", "float64")
]


@pytest.mark.parametrize(
    "wrapper, how, p",
    [pytest.param(*case, marks=[] if case[0] == "ddp" else needs_fsdp2) for case in OWN],
)
def test_each_rank_has_its_own(ranks, wrapper, how, p):
    dtype = {"float16": torch.float16, "float64": torch.float64}.get(how, torch.float32)
    micro_steps = 3 if how == "accumulated" else 1
    scale = 16.0 if how == "scaled" else 1.0
    answers = ranks.run(own_norms, wrapper, p, dtype, micro_steps, scale, how == "late")
    want = [own for _, own, _, _ in answers]
    assert len(set(want)) == 4, "vacuous"
    for norms, _, total, names in answers:
        assert norms == answers[0][0] == pytest.approx(want, rel=1e-6 if how != "float16" else 2e-3)
        mean = total_norm(pair_grads(), p) * micro_steps / 2
        assert total == pytest.approx(mean, rel=1e-3 if how == "float16" else 1e-6)
        assert names == ["allreduce_"]


def a_step_that_reads_nothing():
    """With all that there is to see, on a device that the host would wait for."""
    model = DDP(Pair())
    rank_norms = distclip.RankNorms(model)
    watch = distclip.Watch(distclip.per_expert("first.c", distclip.per_layer()))
    policy = distclip.Escalate(distclip.FixedNorm(1.0))
    clipper = judged_late(
        distclip.GradClipper(model, policy=policy, watch=watch, rank_norms=rank_norms)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    model(factor()).backward()
    with NoHostReads(), count_collectives() as seen:
        report = clipper.step(optimizer)
    return report.rank_norms.tolist(), len(report.layers), report.action, seen.names


def test_the_host_reads_nothing_and_one_message_is_sent(ranks):
    for norms, layers, action, names in ranks.run(a_step_that_reads_nothing):
        assert len(set(norms)) == 4 and min(norms) > 0 and layers == 8 + 2
        assert action == "none" and names == ["allreduce_"]


def gradients(how):
    """With and without: of DDP the same bits, with a hook of one's own too."""
    seen = []

    def doubled(state, bucket):
        seen.append(state)
        bucket.buffer().mul_(2)
        return allreduce_hook(None, bucket)

    out = []
    for watched in (False, True):
        model = DDP(Pair())
        hook = ("mine", doubled) if how == "hook" else None
        if watched:
            distclip.RankNorms(model, comm_hook=hook)
        elif hook:
            model.register_comm_hook(*hook)
        model(factor()).backward()
        out.append([p.grad.clone() for p in model.parameters()])
    return [torch.equal(a, b) for a, b in zip(*out, strict=True)], out[0][0].norm().item(), seen


@pytest.mark.parametrize("how", ["torch's", "hook"])
def test_gradients_stay_what_they_were(ranks, how):
    for equal, norm, seen in ranks.run(gradients, how):
        assert all(equal) and norm > 0
        assert seen == (["mine"] * 2 if how == "hook" else [])


FAULTS = {"1 %": 1.01, "100 times": 100.0, "nothing": 0.0, "NaN": NAN}


def off_after_a_step(wrapper, how, log):
    """All ranks read the same; rank 2 is off from the third step on."""
    model = WRAPPERS[wrapper](Pair())
    sinks = [distclip.JSONLSink(log)] if dist.get_rank() == 0 else [None]
    rank_norms = distclip.RankNorms(model)
    clipper = distclip.GradClipper(model, 1.0, rank_norms=rank_norms, sinks=sinks)
    out = []
    for step in range(4):
        model.zero_grad()
        off = FAULTS[how] if dist.get_rank() == 2 and step >= 2 else 1.0
        model(torch.tensor(off)).backward()
        report = clipper.clip_()
        out.append((report.outlier_rank, report.rank_deviation))
    return out


@pytest.mark.parametrize("how", FAULTS)
@pytest.mark.parametrize("wrapper", ["ddp", pytest.param("fsdp2", marks=needs_fsdp2)])
def test_a_rank_that_is_off_is_named(ranks, tmp_path, wrapper, how):
    answers = ranks.run(off_after_a_step, wrapper, how, str(tmp_path / "log.jsonl"))
    assert answers == [answers[0]] * 4
    assert answers[0][:2] == [(None, 0.0)] * 2
    for rank, deviation in answers[0][2:]:
        assert rank == 2 and deviation > 8
        if how == "1 %":  # all others are equal: measured in 0.1 %
            assert deviation == pytest.approx(math.log(1.01) / 1e-3, rel=1e-3)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "total_norm" in row]
    assert [row["outlier_rank"] for row in rows] == [None, None, 2, 2]
    assert all(len(row["rank_norms"]) == 4 and row["action"] == "none" for row in rows)


def test_chance_is_no_outlier():
    """Of what spreads as norms do, the farthest is rarely told."""
    draw = torch.Generator().manual_seed(0)
    told_of = 0
    model = nn.Linear(1, 1)
    model.weight.grad = torch.ones(1, 1)
    report = distclip.GradClipper(model, 1.0).measure()
    assert report.rank_norms.numel() == 0 and report.outlier_rank is None
    for _ in range(200):
        noise = 0.1 * torch.randn(64, generator=draw)
        spread = distclip.ClipReport.deferred(dict, {"rank_norms": 5 + noise})
        told_of += spread.outlier_rank is not None
        noise[7] += 1.5
        off = distclip.ClipReport.deferred(dict, {"rank_norms": 5 + noise})
        assert off.outlier_rank == 7
    assert told_of <= 2


def two_norms():
    model = DDP(Pair())
    rank_norms = distclip.RankNorms(model)
    model(factor()).backward()  # before there is a clipper
    clippers = [distclip.GradClipper(model, INF, rank_norms=rank_norms)]
    before = clippers[0].measure().rank_norms.tolist()
    clippers.append(distclip.GradClipper(model, INF, norm_type=INF, rank_norms=rank_norms))
    model.zero_grad()
    model(factor()).backward()
    own = [g.double() * factor().item() for g in pair_grads()]
    after = [clipper.measure().rank_norms.tolist() for clipper in clippers]
    return [before, *after], [total_norm(own, p) for p in (2.0, 2.0, INF)]


def test_two_clippers_of_one_model_have_each_its_norm(ranks):
    answers = ranks.run(two_norms)
    for norms, _ in answers:
        for i, seen in enumerate(norms):
            assert seen == pytest.approx([want[i] for _, want in answers], rel=1e-6)
        assert norms[1] != norms[2], "vacuous"


class Silent(nn.Module):
    """Without parameters, beside one that has some."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.ReLU(), nn.Linear(4, 2)])

    def forward(self, x):
        return self.parts[1](self.parts[0](x)).sum()


def a_unit_with_a_module_without_parameters():
    torch.manual_seed(0)
    model = Silent()
    want = 4 * factor().double().item() * math.sqrt(4 * 2 + 2)
    fully_shard(list(model.parts), mesh=mesh(4))
    fully_shard(model, mesh=mesh(4))
    rank_norms = distclip.RankNorms(model)
    clipper = distclip.GradClipper(model, INF, rank_norms=rank_norms)
    model(torch.ones(4, 4)).mul(factor()).backward()
    return clipper.clip_().rank_norms.tolist(), want


@needs_fsdp2
def test_a_module_without_parameters_may_be_in_a_unit(ranks):
    answers = ranks.run(a_unit_with_a_module_without_parameters)
    want = [own for _, own in answers]
    assert len(set(want)) == 4, "vacuous"
    for norms, _ in answers:
        assert norms == pytest.approx(want, rel=1e-6)


def steps_without_a_reduction(p, late):
    """Gradients that are equal on all ranks already, and DDP's hook runs at some steps alone."""
    model = DDP(Pair())
    rank_norms = distclip.RankNorms(model)
    clipper = distclip.GradClipper(model, INF, norm_type=p, rank_norms=rank_norms)
    judged_late(clipper, late)
    optimizer = torch.optim.SGD(model.parameters(), 0.0, fused=True)
    norms, names, judged = [], [], []
    for reduces in (True, False, False, True, False):
        optimizer.zero_grad()
        with nullcontext() if reduces else model.no_sync():
            model(factor() if reduces else torch.tensor(2.0)).backward()
        before = clipper.measure().rank_norms
        with count_collectives() as seen:
            report = clipper.step(optimizer)
        assert report.rank_norms.equal(before), "measure() leaves them to the step"
        norms.append(report.rank_norms.tolist())
        judged.append((report.outlier_rank, report.rank_deviation is None, report.total_norm))
        names.append(seen.names)
    clipper.rebuild()
    norms.append(clipper.clip_().rank_norms.tolist())
    return norms, names, judged, total_norm([g.double() * factor().item() for g in pair_grads()], p)


@pytest.mark.parametrize("p, late", [(2.0, False), (2.0, True), (INF, False)])
def test_a_step_that_reduced_nothing_has_no_norms_of_ranks(ranks, p, late):
    answers = ranks.run(steps_without_a_reduction, p, late)
    want = [own for *_, own in answers]
    for norms, names, judged, _ in answers:
        assert norms[0] == norms[3] == pytest.approx(want, rel=1e-6)
        assert norms[1] == norms[2] == norms[4] == norms[5] == []
        assert names == [["allreduce_"]] * 5
        assert judged[1][:2] == (None, True)
        assert judged[1][2] == pytest.approx(2 * total_norm(pair_grads(), p), rel=1e-6)


def one_rank_forgets():
    model = DDP(Pair())
    rank_norms = distclip.RankNorms(model)
    clipper = distclip.GradClipper(model, INF, rank_norms=rank_norms)
    model(factor()).backward()
    if dist.get_rank() == 1:
        rank_norms.forget()
    try:
        clipper.clip_()
    except distclip.AgreementError as error:
        return str(error)


def test_ranks_that_differ_in_it_are_named(ranks):
    for text in ranks.run(one_rank_forgets):
        assert "rank 0,2-3: at step 1: clip_, after" in text
        assert "rank 1: at step 1: clip_, no gradient reduced before it (RankNorms), after" in text


def slips(what):
    model = Pair()
    try:
        if what == "twice":
            model = DDP(model)
            rank_norms = distclip.RankNorms(model)
            clipper = distclip.GradClipper(model, 1.0, rank_norms=rank_norms)
            for _ in range(2):
                model(torch.tensor(1.0)).backward()
            clipper.clip_()
        elif what == "late":
            model = DDP(model)
            model(torch.tensor(1.0)).backward()
            rank_norms = distclip.RankNorms(model)
            distclip.GradClipper(model, 1.0, rank_norms=rank_norms).clip_()
        elif what == "own hook":
            model = DDP(model)
            model.register_comm_hook(None, allreduce_hook)
            distclip.RankNorms(model)
        elif what == "delayed":
            named = list(model.named_parameters())[:2]
            last = named[0][1]
            model = DDP(model, delay_all_reduce_named_params=named, param_to_hook_all_reduce=last)
            distclip.RankNorms(model)
        elif what == "fsdp1":
            distclip.RankNorms(FSDP1(model, device_id=torch.device("cpu")))
        elif what == "plain":
            distclip.RankNorms(model)
        elif what == "hook without ddp":
            distclip.RankNorms(fsdp2(model), comm_hook=(None, allreduce_hook))
        elif what == "tensor parallel":
            inner = mesh(2, 2)["inner"]
            for name, p in list(model.first.named_parameters()):
                placed = distribute_tensor(p.detach(), inner, [Shard(0)], src_data_rank=None)
                setattr(model.first, name, nn.Parameter(placed))
            fully_shard(model.first, mesh=mesh(2, 2)["outer"])
            distclip.RankNorms(model)
        elif what == "replicate":
            distclip.RankNorms(replicate(model))
        elif what == "several meshes":
            fully_shard(model.first, mesh=mesh(2, 2)["inner"])
            fully_shard(model, mesh=mesh(4))
            distclip.RankNorms(model)
        elif what == "fewer ranks":
            model = DDP(model, process_group=mesh(2, 2)["inner"].get_group())
            distclip.GradClipper(model, 1.0, rank_norms=distclip.RankNorms(model))
        elif what == "the class":
            distclip.GradClipper(model, 1.0, rank_norms=distclip.RankNorms)
    except distclip.DistclipError as error:
        return str(error)


REFUSED = {
    "twice": "gradients were reduced more than once since the last call",
    "late": "there are gradients, and RankNorms saw no reduction",
    "own hook": "the model has the communication hook allreduce_hook already, and DDP takes one",
    "delayed": "RankNorms: the model reduces first.a and 1 more past its communication hook "
    "(delay_all_reduce_named_params), where no rank's own gradient is seen; build",
    "fsdp1": "the model is wrapped by FSDP1",
    "plain": "nothing here reduces gradients where they can be seen",
    "hook without ddp": "comm_hook= is DDP's",
    "tensor parallel": "parameters of first are divided by tensor or expert parallelism",
    "replicate": "RankNorms: ",
    "several meshes": "ranks that hold different parts cannot be compared",
    "fewer ranks": "and this clipper is of ranks (0, 1, 2, 3)",
    "the class": "pass distclip.RankNorms(model), built after wrapping",
}


NEED_FSDP2 = ("hook without ddp", "tensor parallel", "several meshes")


@pytest.mark.parametrize(
    "what",
    [pytest.param(w, marks=needs_fsdp2) if w in NEED_FSDP2 else w for w in REFUSED],
)
def test_refused_on_all_ranks(ranks, what):
    for text in ranks.run(slips, what):
        assert REFUSED[what] in text, text
