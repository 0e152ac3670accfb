"""Ranks with unequal numbers of batches: `join()` is refused before anything is sent; what the
refusal advises works."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from distclip.testing import count_collectives
from parity.oracle import total_norm

REFUSED = (
    "{} inside DistributedDataParallel.join(): ranks that have run out of data take no part in it, "
    "and the others would wait for them. "
    "Give all ranks as many batches (DistributedSampler pads, or drops the rest with "
    "drop_last=True) and leave join() out. Where "
    "DistributedDataParallel alone shares the model out, every rank that is still at work holds "
    "the whole gradient, and a clipper of each "
    "rank's own serves inside join(): GradClipper(model, ..., process_group=distclip.LOCAL), with "
    "a fixed threshold, since adaptive ones "
    "learn from every step"
)


def job(**options):
    torch.manual_seed(0)
    model = DDP(nn.Linear(6, 3))
    return (
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        distclip.GradClipper(model, 0.5, **options),
    )


def batch(step):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))


def backward(model, optimizer, step):
    optimizer.zero_grad()
    model(batch(step)).square().sum().backward()


def inside(act, form):
    model, optimizer, clipper = job()
    other = nn.ModuleDict({"part": model})
    if form != "join":
        of = {
            "nested": other,
            "Join": model,
            "the module inside": model.module,
            "its parameters": list(model.module.named_parameters()),
        }
        clipper = distclip.GradClipper(of[form], 0.5)
    said = []
    with model.join() if form == "join" else Join([model]):
        backward(model, optimizer, 0)
        before = [p.grad.clone() for p in model.parameters()]
        with count_collectives() as seen:
            try:
                clipper.step(optimizer) if act == "step" else getattr(clipper, act)()
            except distclip.ConfigError as error:
                said.append(str(error))
        stood = all(map(torch.equal, before, [p.grad for p in model.parameters()]))
    return said, seen.names, stood


FORMS = ["join", "Join", "nested", "the module inside", "its parameters"]


@pytest.mark.parametrize(
    "form, act",
    [(f, act) for f in FORMS for act in ("step", "clip_", "measure", "audit", "decide", "rebuild")],
)
def test_refused_before_anything_is_sent(ranks, act, form):
    for said, sent, stood in ranks.run(inside, act, form):
        assert (
            said == [REFUSED.format("GradClipper()" if act == "rebuild" else f"{act}()")]
            and sent == []
            and stood
        )


def afterwards():
    """torch leaves its mark on the module, and the context is over all the same; one that is not
    enabled is none."""
    model, optimizer, clipper = job()
    seen = []
    for join in (lambda: model.join(enable=False), lambda: model.join()):
        with join():
            backward(model, optimizer, 0)
            if not model._join_config.enable:
                seen.append(clipper.step(optimizer).total_norm.item())
        for step in range(3):
            backward(model, optimizer, step)
            want = total_norm([p.grad for p in model.parameters()])
            seen.append(clipper.step(optimizer).total_norm.item() / want)
    with model.join():
        backward(model, optimizer, 0)
        try:
            clipper.step(optimizer)
        except distclip.ConfigError:
            return model._join_config.enable, seen
    return None


def test_before_and_after_the_context_it_works(ranks):
    rows = ranks.run(afterwards)
    assert len({str(row) for row in rows}) == 1
    marked, seen = rows[0]
    assert (
        marked
        and len(seen) == 7
        and seen[1:] == pytest.approx([1.0] * 6, rel=1e-6)
        and seen[0] > 0.5
    )


def of_each_ranks_own():
    """As advised: rank r has 3 + r batches."""
    model, optimizer, clipper = job(process_group=distclip.LOCAL)
    norms, ratios = [], []
    with model.join():
        for step in range(3 + dist.get_rank()):
            backward(model, optimizer, step)
            want = total_norm([p.grad for p in model.parameters()])
            with count_collectives() as seen:
                report = clipper.step(optimizer)
            assert report.clipped and seen.names == []
            norms.append(report.total_norm.item())
            ratios.append(norms[-1] / want)
    return norms, ratios, [p.detach().tolist() for p in model.parameters()]


def test_a_clipper_of_each_ranks_own_serves_inside_join(ranks):
    rows = ranks.run(of_each_ranks_own)
    longest = rows[3][0]
    assert [len(norms) for norms, *_ in rows] == [3, 4, 5, 6]
    for norms, ratios, end in rows:
        assert norms == longest[: len(norms)] and ratios == pytest.approx(
            [1.0] * len(ratios), rel=1e-6
        )
        assert end == rows[3][2], "DDP hands the last one's parameters to all"
