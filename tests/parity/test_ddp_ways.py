"""DDP as torch offers it besides its defaults: an optimizer whose states are sharded (ZeRO stage 1),
compressed gradients, buckets as gradients, and ranks that train apart for some steps (local SGD)."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    fp16_compress_hook,
)
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from distclip.testing import count_collectives
from parity.oracle import total_norm
from precision.jobs import bits, mlp
from torchs_own import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

MAX_NORM, STEPS = 0.2, 4
ADAMW = {"lr": 0.05, "eps": 1e-2}  # with a large eps a gradient's scale counts


def batch(step, rank):
    source = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(5, 6, generator=source) * 3, torch.randn(5, 4, generator=source)


def backward(model, step, rank, share=1.0):
    x, y = batch(step, rank)
    weight = next(model.parameters())
    ((model(x.to(weight.dtype)) - y).square().mean() * share).backward()


def clipped_by_hand(params):
    """The norm before, of float64 gradients, which are multiplied in place."""
    norm = total_norm([p.grad for p in params], 2.0)
    assert norm > MAX_NORM
    for p in params:
        p.grad *= MAX_NORM / norm
    return norm


def trained_alone(ranks=range(4)):
    """In float64, on the mean over these ranks' batches: norms, and parameters at the end."""
    model = mlp().double()
    optimizer, norms = torch.optim.AdamW(model.parameters(), **ADAMW), []
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in ranks:
            backward(model, step, rank, 1 / len(ranks))
        norms.append(clipped_by_hand(list(model.parameters())))
        optimizer.step()
    return norms, [p.detach() for p in model.parameters()]


def zero(buckets, fused):
    def make(model):
        return ZeroRedundancyOptimizer(
            model.parameters(), torch.optim.AdamW, parameters_as_bucket_view=buckets, fused=fused,
            **ADAMW,
        )  # fmt: skip

    return {}, make


def adamw(**ddp):
    return ddp, lambda model: torch.optim.AdamW(model.parameters(), **ADAMW)


WAYS = {
    "zero": zero(False, False),
    "zero fused": zero(False, True),
    "zero buckets": zero(True, False),
    "gradient_as_bucket_view": adamw(gradient_as_bucket_view=True),
    "static_graph": adamw(static_graph=True),
}


def train(way, operation):
    ddp, make = WAYS[way]
    model = DDP(mlp(), **ddp)
    optimizer, clipper, norms, calls = make(model), distclip.GradClipper(model, MAX_NORM), [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, step, dist.get_rank())
        if operation == "step":
            report = clipper.step(optimizer)
        else:
            with count_collectives() as seen:
                report = clipper.clip_(optimizer)
            calls.append(seen.names)
            optimizer.step()
        norms.append(report.total_norm.item())
    return norms, [p.detach().double() for p in model.parameters()], calls, bits(model.parameters())


@pytest.mark.parametrize("operation", ["step", "clip_"])
@pytest.mark.parametrize("way", WAYS)
def test_as_one_process_would_train(ranks, way, operation):
    norms, params = trained_alone()
    found = ranks.run(train, way, operation)
    for seen, ended, calls, _ in found:
        assert seen == pytest.approx(norms, rel=1e-5)
        for one, other in zip(ended, params, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert calls == [["allreduce_"]] * (STEPS if operation == "clip_" else 0)
    assert len({each[-1] for each in found}) == 1


def compressed():
    model = DDP(mlp())
    model.register_comm_hook(None, fp16_compress_hook)
    clipper = distclip.GradClipper(model, MAX_NORM)
    backward(model, 0, dist.get_rank())
    before = [p.grad.double().clone() for p in model.parameters()]
    with count_collectives() as seen:
        report = clipper.clip_()
    params = list(model.parameters())
    for p, grad in zip(params, before, strict=True):
        torch.testing.assert_close(
            p.grad.double(), grad * MAX_NORM / total_norm(before, 2.0), rtol=1e-6, atol=1e-9
        )
    grads = bits(p.grad for p in params)
    return report.total_norm.item(), total_norm(before, 2.0), seen.names, grads


def test_compressed_gradients_are_measured_as_they_are(ranks):
    norms, _ = trained_alone()
    found = ranks.run(compressed)
    for seen, exact, calls, _ in found:
        assert seen == pytest.approx(exact, rel=1e-6) and calls == ["allreduce_"]
        assert seen != pytest.approx(norms[0], rel=1e-6), "float16 loses something"
        assert seen == pytest.approx(norms[0], rel=1e-2)
    assert len({each[-1] for each in found}) == 1


# ------------------------------------------------------------------------------------- local SGD


def subgroups(size):
    """Of this rank: every rank makes all."""
    groups = [dist.new_group(range(start, start + size)) for start in range(0, 4, size)]
    return groups[dist.get_rank() // size]


def apart(size, process_group):
    """From the first step on gradients are reduced over `size` ranks alone, and models averaged
    over all of them later than this job ends. `process_group`: where norms are."""
    together = subgroups(size)
    model = DDP(mlp())
    model.register_comm_hook(PostLocalSGDState(None, together, 0), post_localSGD_hook)
    optimizer = PostLocalSGDOptimizer(
        torch.optim.AdamW(model.parameters(), **ADAMW),
        PeriodicModelAverager(period=100, warmup_steps=100),
    )
    given = {"all": None, "together": together, "local": distclip.LOCAL}[process_group]
    norms = []
    try:
        clipper = distclip.GradClipper(model, MAX_NORM, process_group=given)
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model, step, dist.get_rank())
            norms.append(clipper.step(optimizer).total_norm.item())
    except distclip.AgreementError as error:
        return str(error)
    finally:
        dist.destroy_process_group(together)
    return norms, [p.detach().double() for p in model.parameters()], bits(model.parameters())


@pytest.mark.parametrize("size, process_group", [(2, "together"), (1, "together"), (1, "local")])
def test_ranks_that_train_apart_clip_apart(ranks, size, process_group):
    found = ranks.run(apart, size, process_group)
    for rank, (seen, ended, _) in enumerate(found):
        first = rank // size * size
        norms, params = trained_alone(range(first, first + size))
        assert seen == pytest.approx(norms, rel=1e-5)
        for one, other in zip(ended, params, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert len({each[-1] for each in found}) == 4 // size


def test_without_their_group_the_refusal_says_what_to_give(ranks):
    for text in ranks.run(apart, 2, "all"):
        assert "gradients that should be copies are not equal" in text
        assert (
            "If ranks train apart on purpose (local SGD, DiLoCo), give process_group=: the ranks "
            "that reduce their gradients together, or distclip.LOCAL." in text
        )


def test_the_plain_hook_is_no_reason_to_refuse(ranks):
    assert ranks.run(with_plain_hook) == [True] * 4


def with_plain_hook():
    model = DDP(mlp())
    model.register_comm_hook(model.process_group, allreduce_hook)
    clipper = distclip.GradClipper(model, MAX_NORM)
    backward(model, 0, dist.get_rank())
    return clipper.clip_().clipped
