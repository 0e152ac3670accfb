"""Gradients that `backward()` leaves unfinished (torch 2.15): a clip before `finalize_backward()`
is refused on all ranks, by name."""

import math
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from distclip.testing import count_collectives
from parity.layouts import mesh

pytestmark = pytest.mark.skipif(
    not hasattr(DDP, "finalize_backward"),
    reason="torch < 2.15: gradients are final after backward()",
)
WAITS = (
    "it was told to wait for its finalize_backward() (manual backward finalization); call "
    "that "
    "after backward() and before the clip"
)
HANDLE = "call wait() of the handle that its finalize_backward(async_op=True) gave, before the clip"


def layers():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def batch(rank, step):
    source = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(3, 6, generator=source)


def truth(step):
    """The norm in float64, by one process, of the mean over four ranks."""
    model = layers().double()
    (sum(model(batch(rank, step).double()).square().sum() for rank in range(4)) / 4).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()


def ddp():
    model = DDP(layers())
    model.require_manual_backward_finalization = True
    return model, {"the model": model}


def ddp_inside():
    """Two wrappers in a module that is none."""
    parts = layers()
    parts[0], parts[2] = DDP(parts[0]), DDP(parts[2])
    for part in (parts[0], parts[2]):
        part.require_manual_backward_finalization = True
    return parts, {"0": parts[0], "2": parts[2]}


def fsdp2():
    model = layers()
    fully_shard(model[0], mesh=mesh(4))
    fully_shard(model, mesh=mesh(4))
    model.set_manual_backward_finalization(True)
    return model, {"the model": model}


def hsdp():
    model = fully_shard(layers(), mesh=mesh(2, 2))
    model.set_manual_backward_finalization(True)
    return model, {"the model": model}


def fsdp2_inside():
    model = layers()
    for part in (model[0], model[2]):
        fully_shard(part, mesh=mesh(4)).set_manual_backward_finalization(True)
    return model, {"0": model[0], "2": model[2]}


def held(model):
    """This rank's parts of parameters and gradients, as they are now: a module that waits may have
    its parameters whole."""
    found = [t for p in model.parameters() for t in (p.detach(), p.grad) if t is not None]
    return [t.to_local() if hasattr(t, "to_local") else t for t in found]


def refusal(call):
    try:
        call()
    except distclip.GradientError as error:
        return str(error)
    return None


def clipped_too_early(build, operation, late):
    """Ranks `late` finalize only after the clip was refused."""
    model, waiting = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    clipper = distclip.GradClipper(model, 0.1)
    does = {"step": lambda: clipper.step(optimizer)}.get(operation) or getattr(clipper, operation)
    said, norms, collectives, untouched = [], [], [], []
    for step in range(2):
        optimizer.zero_grad()
        model(batch(dist.get_rank(), 0)).square().sum().backward()
        if dist.get_rank() not in late:
            for module in waiting.values():
                module.finalize_backward()
        before = [t.clone() for t in held(model)]
        said.append(refusal(does))
        untouched.append(all(torch.equal(a, b) for a, b in zip(before, held(model), strict=True)))
        if dist.get_rank() in late:
            for module in waiting.values():
                module.finalize_backward()
        with count_collectives() as seen:
            norms.append(clipper.clip_().total_norm.item())
        collectives.append(seen.names)
        assert math.isclose(
            distclip.get_total_norm([p.grad for p in model.parameters()]), 0.1, rel_tol=1e-5
        ), step
    return said, norms, collectives, untouched


# finalizing FSDP2 may send a reduction of its own, so that one rank alone cannot be late
EVERY = (0, 1, 2, 3)


@pytest.mark.parametrize(
    "build, late",
    [
        (ddp, EVERY),
        (ddp, (2,)),
        (ddp_inside, EVERY),
        (ddp_inside, (2,)),
        (fsdp2, EVERY),
        (hsdp, EVERY),
        (fsdp2_inside, EVERY),
    ],
)
def test_a_clip_before_finalize_backward(ranks, build, late):
    rows = ranks.run(clipped_too_early, build, "clip_", late)
    which = (
        "0 are not final (2 such modules in all)"
        if "inside" in build.__name__
        else "the model are not final"
    )
    told = f"the gradients of {which}: {WAITS}"
    who = "rank 0-3" if len(late) == 4 else "rank 2"
    for said, norms, collectives, untouched in rows:
        assert said == [f"step {step}: {who}: {told}" for step in (1, 3)]
        assert untouched == [True, True]
        assert norms == pytest.approx([truth(0)] * 2, rel=1e-6) and norms[0] > 0.1
        assert collectives == [["allreduce_"]] * 2
    assert len({tuple(norms) for _, norms, *_ in rows}) == 1


@pytest.mark.parametrize("operation", ["step", "measure", "decide", "audit"])
def test_every_call_refuses(ranks, operation):
    for build, late, who in ((ddp, (1, 3), "rank 1,3"), (fsdp2, EVERY, "rank 0-3")):
        for said, *_ in ranks.run(clipped_too_early, build, operation, late):
            assert said[0] == f"step 1: {who}: the gradients of the model are not final: {WAITS}"


def handed_out():
    model, _ = fsdp2()
    clipper = distclip.GradClipper(model, 0.1)
    model(batch(dist.get_rank(), 0)).square().sum().backward()
    handle = model.finalize_backward(async_op=True)
    said = refusal(clipper.clip_)
    handle.wait()
    return said, clipper.clip_().total_norm.item()


def test_a_reduction_that_was_handed_out(ranks):
    for said, norm in ranks.run(handed_out):
        assert said == f"step 1: rank 0-3: the gradients of the model are not final: {HANDLE}"
        assert norm == pytest.approx(truth(0), rel=1e-6)


def parameters_meanwhile():
    """What is no gradient can be measured at any time, and a module that finalizes by itself again
    is fine."""
    model, _ = fsdp2()
    clipper = distclip.GradClipper(model, math.inf)
    model(batch(dist.get_rank(), 0)).square().sum().backward()
    model.finalize_backward()
    of_parameters = clipper.measure(of="param").total_norm.item()
    model.set_manual_backward_finalization(False)
    model.zero_grad()
    model(batch(dist.get_rank(), 1)).square().sum().backward()
    return of_parameters, clipper.clip_().total_norm.item()


def test_what_is_final_is_clipped(ranks):
    want = torch.cat([p.detach().double().flatten() for p in layers().parameters()]).norm().item()
    for of_parameters, norm in ranks.run(parameters_meanwhile):
        assert of_parameters == pytest.approx(want, rel=1e-6) and norm == pytest.approx(
            truth(1), rel=1e-6
        )


def after_a_pipeline():
    """Each stage, sharded over two ranks, is told to wait by the schedule, which finalizes it at
    its end."""
    grid = mesh(2, 2)
    pipe, data = grid["outer"], grid["inner"]
    stage_of, copy_of = pipe.get_local_rank(), data.get_local_rank()
    first, act, last = layers()
    part = fully_shard(
        nn.Sequential(OrderedDict(last=last) if stage_of else OrderedDict(first=first, act=act)),
        mesh=data,
    )
    stage = PipelineStage(part, stage_of, 2, torch.device("cpu"), group=pipe.get_group())
    schedule = ScheduleGPipe(stage, 3, loss_fn=lambda out, _: out.square().sum(), scale_grads=False)
    clipper = distclip.GradClipper(part, math.inf)
    x = torch.cat([batch(2 * copy_of, 0), batch(2 * copy_of + 1, 0)])
    schedule.step(target=torch.zeros(6, 4)) if stage_of else schedule.step(x)
    assert len(clipper._stages.measurer.wrappers) == 1
    return clipper.clip_().total_norm.item()


def test_a_pipeline_schedule_has_finalized_its_stages(ranks):
    assert ranks.run(after_a_pipeline) == pytest.approx([2 * truth(0)] * 4, rel=1e-6), (
        "the sum over batches, the mean over two copies"
    )
