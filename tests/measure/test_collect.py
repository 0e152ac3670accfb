"""Which gradients are taken, from one step to the next: the lists that a step is compared with must
notice every change."""

import gc
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import _functional_collectives as functional_collectives
from torch.utils._pytree import tree_map
from torch.utils.weak import TensorWeakRef

import distclip
from distclip.measure.collect import GradientCollector
from distclip.measure.gradient_cache import GradientCache


def params_of(*grads):
    named = []
    for i, grad in enumerate(grads):
        p = nn.Parameter(torch.zeros(grad.shape))
        p.grad = grad.clone()
        named.append((f"p{i}", p))
    return named


def norm(clipper):
    return clipper.measure().total_norm.item()


class Wrapped(torch.Tensor):
    """A subclass without memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        inner = lambda x: x.inner if isinstance(x, Wrapped) else x  # noqa: E731
        return func(*tree_map(inner, args), **tree_map(inner, kwargs or {}))


def test_a_gradient_without_memory_of_its_own_counts():
    named = params_of(torch.tensor([3.0, 4.0]), torch.tensor([12.0]))
    held = {id(p): Wrapped(p.grad) if i == 1 else p.grad for i, (_, p) in enumerate(named)}
    clipper = distclip.GradClipper(named, math.inf, grad_of=lambda p: held[id(p)])
    assert [norm(clipper) for _ in range(3)] == [13.0] * 3


def one_still_arriving():
    named = params_of(torch.tensor([3.0, 4.0]), torch.tensor([12.0]))
    clipper, seen = distclip.GradClipper(named, math.inf), []
    for _ in range(3):
        named[1][1].grad = functional_collectives.all_reduce(
            torch.tensor([12.0 / dist.get_world_size()]), "sum", dist.group.WORLD
        )
        seen.append(norm(clipper))
    return seen


def test_a_gradient_that_a_collective_still_fills_counts(ranks):
    assert ranks.run(one_still_arriving) == [[13.0] * 3] * 4


def test_two_tensors_over_one_memory_count_once():
    a, b = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(4))
    a.grad = torch.full((2, 2), 2.0)
    b.grad = a.grad.view(-1)
    clipper = distclip.GradClipper([("a", a), ("b", b)], 1.0)
    for _ in range(2):
        a.grad.fill_(2.0)
        assert clipper.clip_().total_norm.item() == 4.0 and a.grad.flatten().tolist() == [0.5] * 4


def test_what_changes_between_steps_is_noticed():
    named = params_of(torch.ones(6, 4), torch.ones(3))
    clipper, p = distclip.GradClipper(named, math.inf), named[0][1]
    assert norm(clipper) == norm(clipper) == pytest.approx(27**0.5)
    for grad in (
        torch.full((6, 4), 2.0),
        torch.full((4, 6), 2.0).t(),  # other strides
        torch.full((12, 8), 2.0)[::2, ::2],  # not dense
        torch.full((6, 4), 2.0).contiguous(),
    ):
        p.grad = grad
        assert norm(clipper) == pytest.approx((4 * 24 + 3) ** 0.5)
    p.grad = None
    assert norm(clipper) == pytest.approx(3**0.5)
    p.grad = torch.full((6, 4), 2.0)
    assert norm(clipper) == pytest.approx((4 * 24 + 3) ** 0.5)
    p.data, p.grad = torch.zeros(4, 6), torch.ones(4, 6)
    with pytest.raises(
        distclip.GradientError,
        match=r"p0 has local shape \(4, 6\), the plan says "
        r"\(6, 4\)",
    ):
        clipper.measure()


def fast(clipper):
    """Steps that were not looked at one by one."""
    collector, slow = clipper._stages.measurer.collector, []
    looked = GradientCollector._collect_checked

    def counted(self, *args):
        slow.append(1)
        return looked(self, *args)

    GradientCollector._collect_checked = counted
    try:
        yield collector, slow
    finally:
        GradientCollector._collect_checked = looked


def test_channels_last_and_changing_sets_are_compared_in_one_go():
    named = params_of(
        torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last), torch.ones(3), torch.ones(2)
    )
    clipper = distclip.GradClipper(named, math.inf)
    grads = [p.grad for _, p in named]
    for _, slow in fast(clipper):
        for _round in range(4):
            for present in ((1, 1, 1), (1, 0, 1), (0, 1, 1)):
                for (_, p), grad, here in zip(named, grads, present):
                    p.grad = grad if here else None
                want = (
                    torch.cat([g.flatten() for g, here in zip(grads, present) if here])
                    .norm()
                    .item()
                )
                assert norm(clipper) == pytest.approx(want, rel=1e-6)
        assert len(slow) == 3, "once for each set"


def test_gradients_that_stay_are_known_again_and_watched(monkeypatch):
    named = params_of(torch.full((2, 2), 1.0), torch.full((4,), 2.0))
    (_, p), (_, q) = named
    clipper, compared, compare = (
        distclip.GradClipper(named, math.inf),
        [],
        GradientCache._match_layout,
    )
    monkeypatch.setattr(
        GradientCache, "_match_layout", lambda *args: (compared.append(1), compare(*args))[1]
    )
    assert [norm(clipper) ** 2 for _ in range(5)] == pytest.approx([20.0] * 5) and len(
        compared
    ) == 2
    q.grad.mul_(2)
    assert norm(clipper) ** 2 == pytest.approx(68.0) and len(compared) == 2
    p.grad.data = torch.full((2, 2), 3.0)  # the same tensor, other memory
    assert norm(clipper) == 10.0 and len(compared) == 3
    q.grad = p.grad.view(4)
    assert norm(clipper) == norm(clipper) == 6.0, "one gradient under two parameters"
    p.grad, q.grad = torch.ones(2, 2), torch.ones(4)
    assert [norm(clipper) for _ in range(4)] == [pytest.approx(8**0.5)] * 4
    q.grad.data = torch.ones(5)
    with pytest.raises(
        distclip.GradientError,
        match=r"p1 has local shape \(5,\), the plan says "
        r"\(4,\)",
    ):
        clipper.measure()
    # at the same address
    for smaller in (
        lambda grad: setattr(grad, "data", grad.data[:2]),
        lambda grad: grad.resize_(2),
    ):
        q.grad = torch.ones(4)
        assert [norm(clipper) for _ in range(4)] == [pytest.approx(8**0.5)] * 4
        smaller(q.grad)
        with pytest.raises(
            distclip.GradientError,
            match=r"p1 has local shape \(2,\), the plan "
            r"says \(4,\)",
        ):
            clipper.measure()
    q.grad = torch.ones(4)
    assert [norm(clipper) for _ in range(4)] == [pytest.approx(8**0.5)] * 4
    gone = TensorWeakRef(q.grad)
    q.grad = None
    gc.collect()
    assert gone() is None and norm(clipper) == 2.0


def test_one_gradient_that_is_gone_among_those_that_stay():
    """It was freed, so what remembers it gives None, which is what the parameter has now."""
    first, second, third = params_of(torch.tensor([3.0]), torch.tensor([12.0]), torch.tensor([4.0]))
    clipper = distclip.GradClipper([first, second, third], math.inf)
    assert [norm(clipper) for _ in range(3)] == [13.0] * 3
    second[1].grad = None
    assert [norm(clipper) for _ in range(3)] == [5.0] * 3
    second[1].grad = torch.tensor([12.0])
    first[1].grad = None
    assert [norm(clipper) for _ in range(3)] == pytest.approx([math.sqrt(160)] * 3)
    first[1].grad = torch.tensor([3.0])
    assert [norm(clipper) for _ in range(3)] == [13.0] * 3


@pytest.mark.parametrize("act", ["clip_", "step", "measure", "decide"])
def test_gradients_are_not_kept_alive(act):
    named = params_of(torch.ones(1000))
    p = named[0][1]
    optimizer, clipper = torch.optim.SGD([p], 0.1), distclip.GradClipper(named, 1.0)
    for _ in range(2):
        p.grad = torch.ones(1000)
        seen = TensorWeakRef(p.grad)
        clipper.step(optimizer) if act == "step" else getattr(clipper, act)()
        p.grad = None
        gc.collect()
        assert seen() is None


def test_old_optimizers_are_not_kept_alive():
    named = params_of(torch.ones(10))
    p, clipper = named[0][1], distclip.GradClipper(named, 1.0)
    optimizer = torch.optim.AdamW([p], 0.1)
    clipper.step(optimizer)
    state = TensorWeakRef(optimizer.state[p]["exp_avg"])
    del optimizer
    gc.collect()
    assert state() is None


def test_a_grad_of_that_copies_is_told():
    p = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    p.grad = torch.ones(3, dtype=torch.bfloat16)
    clipper = distclip.GradClipper([("w", p)], 1.0, grad_of=lambda p: p.grad.float())
    with pytest.raises(distclip.GradientError) as error:
        clipper.clip_()
    assert str(error.value) == (
        "step 1: rank 0: grad_of makes a new tensor for w at each call, so that clipping it "
        "changes nothing; return the tensor that the "
        "optimizer reads"
    )
