"""Gradients placed otherwise than their parameters, as torch's optimizers take them; Partial ones,
refused or reduced on request."""

import math
import re
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import distclip
from distclip.testing import count_collectives
from parity.layouts import mesh
from parity.oracle import NORMS, total_norm
from setup.test_refusals import refusal

BOUND = 1.3  # of elements, which are normal numbers
LOOP = (
    " Before clipping, on all ranks: `for p in model.parameters(): p.grad = "
    "p.grad.redistribute(placements=p.placements) if "
    "isinstance(p.grad, DTensor) else p.grad`"
)
ADVICE = LOOP + '; GradClipper(..., partial_grads="reduce") does it for Partial ones at each step'


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def placed(seed, on, of_param, of_grad, shape=(9, 6)):
    """A parameter and its gradient, each placed in its own way."""
    param = nn.Parameter(distribute_tensor(torch.zeros(shape), on, of_param, src_data_rank=None))
    param.grad = distribute_tensor(drawn(seed, *shape), on, of_grad, src_data_rank=None)
    return param


PLACED = {
    "replicated, of a sharded parameter": lambda: placed(1, mesh(4), [Shard(0)], [Replicate()]),
    "sharded otherwise": lambda: placed(1, mesh(4), [Shard(0)], [Shard(1)]),
    "copies of it": lambda: placed(
        1, mesh(2, 2), [Replicate(), Shard(1)], [Replicate(), Replicate()]
    ),
    "half of it": lambda: placed(1, mesh(2, 2), [Shard(1), Shard(0)], [Replicate(), Shard(0)]),
    "as large, of other rows": lambda: placed(
        1, mesh(2, 2), [Shard(0), Shard(1)], [Shard(1), Shard(0)], (8, 8)
    ),
    "nothing of it": lambda: placed(
        1, mesh(2, 2), [Shard(0), Shard(1)], [Replicate(), Replicate()]
    ),
}


def clipped(how, p, policy):
    """Two steps: the second goes by what the first one found."""
    param, plain = PLACED[how](), nn.Parameter(torch.zeros(4))
    plain.grad = drawn(2, 4)
    whole = [drawn(1, *param.shape), drawn(2, 4)]
    want = total_norm(whole, p)
    rule = {"max_norm": want / 2} if policy == "norm" else {"policy": distclip.FixedValue(BOUND)}
    clipper = distclip.GradClipper([("w", param), ("b", plain)], norm_type=p, **rule)
    rows = []
    for _ in range(2):
        for q, grad in ((param, whole[0]), (plain, whole[1])):
            q.grad.copy_(
                distribute_tensor(grad, q.device_mesh, q.grad.placements, src_data_rank=None)
                if q is param
                else grad
            )
        with count_collectives() as seen:
            report = clipper.clip_()
        after = [param.grad.full_tensor(), plain.grad]
        bounded = (
            [g.clamp(-BOUND, BOUND) for g in whole]
            if policy == "value"
            else [g.double() * float(report.clip_coef) for g in whole]
        )
        worst = max(float((a.double() - b.double()).abs().max()) for a, b in zip(after, bounded))
        rows.append(
            (
                want,
                report.total_norm.item(),
                report.norm_after.item(),
                total_norm(bounded, p),
                worst,
                Counter(seen.names),
            )
        )
    return rows


@pytest.mark.parametrize("policy", ["norm", "value"])
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("how", PLACED)
def test_a_gradient_placed_otherwise_is_measured_as_it_lies(ranks, how, p, policy):
    found = ranks.run(clipped, how, p, policy)
    for want, norm, after, bounded, worst, seen in (row for rows in found for row in rows):
        assert norm == pytest.approx(want, rel=1e-6) and after == pytest.approx(bounded, rel=1e-6)
        assert after < 0.999 * norm, "vacuous"
        assert worst <= 1e-6 and seen == {"allreduce_": 1}
    assert len({(norm.hex(), after.hex()) for rows in found for _, norm, after, *_ in rows}) == 1


def row_sharded_embedding():
    torch.manual_seed(0)
    model, clean = (
        nn.ModuleDict({"emb": nn.Embedding(8, 6), "out": nn.Linear(6, 6)}) for _ in range(2)
    )
    clean.load_state_dict(model.state_dict())
    plan = {
        "emb": RowwiseParallel(input_layouts=Replicate()),
        "out": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh(4), plan)
    steps = []
    for m in (clean, model):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        clipper = distclip.GradClipper(m, 0.5, process_group=None if m is model else distclip.LOCAL)
        m["out"](m["emb"](torch.tensor([1, 5, 5, 0]))).square().sum().backward()
        report = clipper.step(optimizer)
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in m.parameters()]
        steps.append((report.total_norm.item(), torch.cat([p.detach().flatten() for p in whole])))
    return steps, str(model["emb"].weight.grad.placements)


def test_tensor_parallelism_alone_steps_as_one_process_does(ranks):
    for ((norm, clean), (norm_here, model)), placements in ranks.run(row_sharded_embedding):
        assert placements == "(Replicate(),)", "vacuous"
        assert norm_here == pytest.approx(norm, rel=1e-6) and norm > 0.5
        torch.testing.assert_close(model, clean, rtol=1e-6, atol=1e-7)


def copies_in_parts():
    param = placed(1, mesh(4), [Replicate()], [Shard(0)])
    return refusal(distclip.GradClipper([("w", param)], 1.0).clip_)


def units_in_other_rows(how):
    param = PLACED[how]()
    return refusal(distclip.GradClipper([("w", param)], policy=distclip.AGC(0.1)).clip_)


def test_what_cannot_be_stepped_or_scaled_is_refused(ranks):
    assert set(ranks.run(copies_in_parts)) == {
        "GradientError: step 1: rank 0-3: the gradient of w has placements (Shard(dim=0),), its "
        "parameter (Replicate(),): no rank has "
        "all that its copy of the parameter is stepped with." + LOOP
    }


@pytest.mark.parametrize(
    "how", ["replicated, of a sharded parameter", "sharded otherwise", "as large, of other rows"]
)
def test_units_of_other_rows_are_refused(ranks, how):
    assert set(ranks.run(units_in_other_rows, how)) == {
        "GradientError: step 1: rank 0-3: GradientError: the gradient of w is placed otherwise "
        "than its parameter, and units are rows of "
        "the parameter's part; before clipping: p.grad = "
        "p.grad.redistribute(placements=p.placements)"
    }


# Partial gradients


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm, self.last = (
            nn.Linear(8, 16),
            nn.Linear(16, 8),
            nn.LayerNorm(8),
            nn.LayerNorm(8),
        )
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(drawn(i, *p.shape))

    def forward(self, x):
        return self.last(self.norm(self.down(self.up(x).relu())))


def sequence_parallel():
    plan = {
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(output_layouts=Shard(0)),
        "norm": SequenceParallel(sequence_dim=0),
        "last": SequenceParallel(sequence_dim=0, use_local_output=True),
    }
    return parallelize_module(Block(), mesh(4), plan)


def backward(model, x, pull):
    (model(x) * pull).sum().backward()


def trained(options, steps=2):
    """Norms and whole gradients after clipping; `None` for a refusal's text."""
    model, clean = sequence_parallel(), Block().double()
    clipper = distclip.GradClipper(model, 0.5, **options)
    rows = []
    for step in range(steps):
        x, pull = drawn(10 + step, 8, 8), drawn(20 + step, 8, 8)
        mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        for m in (model, clean):
            m.zero_grad()
        backward(model, x[mine], pull[mine])
        backward(clean, x.double(), pull.double())
        partial = sum(any(q.is_partial() for q in p.grad.placements) for p in model.parameters())
        with count_collectives() as seen:
            report = clipper.clip_()
        want = total_norm([p.grad for p in clean.parameters()])
        after = torch.cat([p.grad.full_tensor().double().flatten() for p in model.parameters()])
        coef = float(report.clip_coef)
        off = float(
            (after - coef * torch.cat([p.grad.flatten() for p in clean.parameters()])).abs().max()
        )
        rows.append((partial, want, report.total_norm.item(), off, Counter(seen.names)))
    return rows


def refused_when_partial():
    return refusal(lambda: trained({}))


def test_partial_gradients_are_refused_with_the_loop_that_reduces_them(ranks):
    texts = set(ranks.run(refused_when_partial))
    assert len(texts) == 1
    assert texts.pop() == (
        "GradientError: step 1: rank 0-3: the gradient of norm.weight has placements "
        "(Partial(sum),), its parameter (Replicate(),): "
        "Partial sums that are not reduced yet (sequence parallelism leaves them on norm weights) "
        "(4 gradients in all)." + ADVICE
    )


def test_partial_gradients_are_reduced_on_request(ranks):
    found = ranks.run(trained, {"partial_grads": "reduce"})
    for partial, want, norm, off, seen in (row for rows in found for row in rows):
        assert partial == 4 and want > 0.5, "vacuous"
        assert norm == pytest.approx(want, rel=1e-5) and off < 1e-5
        assert seen["allreduce_"] == 2, (
            "the step's message, and the one that agrees on what is Partial"
        )
        assert seen["all_reduce"] == partial and set(seen) == {"allreduce_", "all_reduce"}
    assert len({norm.hex() for rows in found for _, _, norm, *_ in rows[:1]}) == 1


def one_rank_lacks_it():
    param = placed(1, mesh(4), [Replicate()], [Replicate()])
    clipper = distclip.GradClipper([("w", param)], 1.0, partial_grads="reduce")
    local = param.grad.to_local()
    param.grad = (
        None
        if dist.get_rank() == 2
        else DTensor.from_local(local, mesh(4), [Partial()], run_check=False)
    )
    return refusal(clipper.clip_), param.grad is None or bool(
        torch.equal(param.grad.to_local(), local)
    )


def test_ranks_that_would_wait_for_each_other_are_told(ranks):
    assert set(ranks.run(one_rank_lacks_it, timeout=60)) == {
        (
            "GradientError: step 1: rank 0-1,3 and rank 2 share a mesh and have different Partial "
            "gradients, which cannot be reduced "
            "together; the loss must reach the same parameters on all of them",
            True,
        )
    }


def other_calls():
    """One rank measures parameters where the others clip: they agree on nothing, and are told as
    without the option."""
    param = placed(1, mesh(4), [Replicate()], [Replicate()])
    clipper = distclip.GradClipper([("w", param)], 1.0, partial_grads="reduce")
    param.grad = DTensor.from_local(param.grad.to_local(), mesh(4), [Partial()], run_check=False)
    return refusal(lambda: clipper.measure(of="param") if dist.get_rank() == 1 else clipper.clip_())


def test_ranks_that_make_other_calls_are_told(ranks):
    for text in ranks.run(other_calls):
        assert re.search(
            r"AgreementError: ranks did not do the same.*\nrank 0,2-3: at step 1: "
            r"clip_.*\nrank 1: at step 1: measure",
            text,
        )


def in_orders_of_their_own():
    """Pairs in another order on every second rank: reductions follow the names, and no rank takes
    another gradient's sums."""
    whole, named = {"a": drawn(1, 6), "b": drawn(2, 6), "c": drawn(3, 6)}, []
    for name, on in (("a", mesh(4)), ("b", mesh(2, 2)), ("c", mesh(4))):
        param = nn.Parameter(
            distribute_tensor(torch.zeros(6), on, [Replicate()] * on.ndim, src_data_rank=None)
        )
        place = [Partial()] if on.ndim == 1 else [Replicate(), Partial()]
        size = on.size() if on.ndim == 1 else 2
        param.grad = DTensor.from_local(whole[name] / size, on, place, run_check=False)
        named.append((name, param))
    clipper = distclip.GradClipper(named[:: (-1) ** dist.get_rank()], 1.0, partial_grads="reduce")
    return clipper.clip_().total_norm.item(), total_norm(list(whole.values()))


def test_reductions_have_one_order_on_all_ranks(ranks):
    for norm, want in ranks.run(in_orders_of_their_own):
        assert norm == pytest.approx(want, rel=1e-6) and norm > 1


def without_any():
    named = [("w", nn.Parameter(torch.zeros(3)))]
    named[0][1].grad = torch.ones(3)
    clipper = distclip.GradClipper(named, 1.0, partial_grads="reduce")
    with count_collectives() as seen:
        clipper.clip_()
    return seen.names


def test_without_dtensors_nothing_more_is_sent(ranks):
    assert ranks.run(without_any) == [["allreduce_"]] * 4


def found_elsewhere():
    param = placed(1, mesh(4), [Replicate()], [Replicate()])
    param.main_grad = DTensor.from_local(
        param.grad.to_local(), mesh(4), [Partial()], run_check=False
    )
    said = refusal(distclip.GradClipper([("w", param)], 1.0, grad_of=lambda p: p.main_grad).clip_)
    grad_of = (lambda p: p.grad) if dist.get_rank() == 0 else None
    return said, refusal(
        lambda: distclip.GradClipper([("w", param)], 1.0, partial_grads="reduce", grad_of=grad_of)
    )


def test_gradients_found_elsewhere_are_reduced_there(ranks):
    for said, refused in ranks.run(found_elsewhere, timeout=120):
        assert said.endswith(
            "norm weights). Have grad_of return gradients that are redistributed "
            "to their parameters' placements"
        )
        assert "grad_of finds gradients elsewhere; redistribute them there" in refused


def test_a_mode_that_cannot_be_honoured():
    named = [("w", nn.Parameter(torch.zeros(3)))]
    with pytest.raises(
        distclip.ConfigError, match="partial_grads='sum'; it is one of 'refuse', 'reduce'"
    ):
        distclip.GradClipper(named, 1.0, partial_grads="sum")
    with pytest.raises(
        distclip.ConfigError, match="grad_of finds gradients elsewhere; redistribute them there"
    ):
        distclip.GradClipper(named, 1.0, partial_grads="reduce", grad_of=lambda p: p.grad)


# Frozen parameters are not judged


def frozen_elsewhere():
    model = nn.Sequential(
        nn.Linear(4, 4, device="meta"), nn.Linear(4, 4).to(torch.float8_e4m3fn), nn.Linear(4, 2)
    )
    model[:2].requires_grad_(False)
    model[2].load_state_dict({"weight": drawn(1, 2, 4), "bias": drawn(2, 2)})
    for p in model[2].parameters():
        p.grad = drawn(p.numel(), *p.shape)
    return model


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"policy": distclip.AGC(0.1)}, {"policy": distclip.AdaGC()}]
)
def test_frozen_parameters_may_lie_anywhere(options):
    model = frozen_elsewhere()
    want = total_norm([p.grad for p in model[2].parameters()])
    report = distclip.GradClipper(model, groups=distclip.per_layer(), **options).clip_()
    assert report.total_norm.item() == pytest.approx(want, rel=1e-6) and want > 1


def test_what_has_no_norm_is_named():
    model = frozen_elsewhere()
    clipper = distclip.GradClipper(model, math.inf)
    with pytest.raises(
        distclip.GradientError,
        match=r"measure\(of='param'\): 0.weight is float32 "
        r"on meta, of which no norm can be",
    ):
        clipper.measure(of="param")
    with pytest.raises(
        distclip.GradientError,
        match=r"1.weight is float8_e4m3fn on cpu, .* build "
        r"a clipper of the parameters that have",
    ):
        distclip.GradClipper(model[1:], math.inf).measure(of="param")
    model[0].requires_grad_(True)
    model[0].weight.grad = torch.zeros(4, 4, device="meta")
    with pytest.raises(
        distclip.GradientError,
        match=r"the gradient of 0.weight is on the device "
        r"meta; .* call clipper.rebuild\(\)",
    ):
        clipper.clip_()
    with pytest.raises(distclip.PlacementError, match=r"0\.weight is on the device meta"):
        clipper.rebuild()
