"""Folded and in-place steps are the same; what cannot fold goes in place; nothing is left on the
optimizer."""

import math
from copy import deepcopy

import pytest
import torch
from torch import nn

import distclip
import skips
from late import judged_late

MAKE = {
    "sgd": lambda ps: torch.optim.SGD(ps, 0.1, fused=True),
    "momentum": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "dampening": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, dampening=0.5, fused=True),
    "adam": lambda ps: torch.optim.Adam(ps, 0.1, fused=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, 0.1, fused=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, 0.1, fused=True),
}


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)


def give_grads(net, step, bad=False):
    source = torch.Generator().manual_seed(step)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=source).to(p.dtype)
    if bad:
        next(net.parameters()).grad[0, 0] = math.inf


def run(make, fold, waits=False, bad=(), steps=6, max_norm=0.5, grad_scale=1.0):
    net = model()
    optimizer = make(net.parameters())
    clipper = distclip.GradClipper(net, max_norm, fold=fold)
    judged_late(clipper, waits)
    for step in range(steps):
        give_grads(net, step, step in bad)
        clipper.step(optimizer, grad_scale=grad_scale)
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    return torch.cat([p.detach().flatten() for p in net.parameters()]), optimizer


@pytest.mark.parametrize("grad_scale", [1.0, 0.125])
@pytest.mark.parametrize("name", MAKE)
def test_folded_equals_in_place(name, grad_scale):
    (folded, _), (in_place, _) = (
        run(MAKE[name], fold, grad_scale=grad_scale) for fold in ("auto", "never")
    )
    torch.testing.assert_close(folded, in_place, rtol=1e-7, atol=1e-7)
    assert not torch.equal(
        folded, run(MAKE[name], "auto", max_norm=math.inf, grad_scale=grad_scale)[0]
    ), "vacuous"


@pytest.mark.parametrize("bad", [(0,), (0, 1), (2,), (0, 3)])
@pytest.mark.parametrize("name", MAKE)
@skips.told()
def test_a_bad_step_never_happened_where_the_host_does_not_look(name, bad):
    """As on CUDA: the optimizer is stepped with found_inf, the first step of all included."""
    folded, optimizer = run(MAKE[name], "auto", waits=True, bad=bad)
    net = model()
    reference, clipper = MAKE[name](net.parameters()), distclip.GradClipper(net, 0.5, fold="never")
    for step in range(6):
        if step not in bad:
            give_grads(net, step)
            clipper.step(reference)
    torch.testing.assert_close(
        folded, torch.cat([p.detach().flatten() for p in net.parameters()]), rtol=1e-6, atol=1e-7
    )
    for mine, other in zip(optimizer.state.values(), reference.state.values()):
        assert all(
            torch.allclose(mine[k], other[k], rtol=1e-6, atol=1e-7)
            for k in other
            if other[k] is not None
        )


def folds(optimizer, clipper):
    """Whether the step reads `grad_scale`, seen by a hook of the optimizer."""
    seen = []
    handle = optimizer.register_step_pre_hook(
        lambda o, *_: seen.append(getattr(o, "grad_scale", None) is not None)
    )
    assert clipper.step(optimizer).clipped
    handle.remove()
    return seen == [True]


def test_what_folds():
    net = model()
    for make in MAKE.values():
        give_grads(net, 0)
        before = [p.grad.clone() for p in net.parameters()]
        assert folds(make(net.parameters()), distclip.GradClipper(net, 0.5))
        assert all(p.grad is not None for p in net.parameters()) and before


class Mine(torch.optim.AdamW):
    """May ignore grad_scale."""


def loaded_unfused(params):
    params = list(params)
    optimizer = torch.optim.AdamW(params, 0.1, fused=True)
    optimizer.load_state_dict(torch.optim.AdamW(params, 0.1, fused=False).state_dict())
    return optimizer


IN_PLACE = {
    "not fused": (lambda ps: torch.optim.AdamW(ps, 0.1), {}),
    "another class": (lambda ps: torch.optim.RMSprop(ps, 0.1), {}),
    "a subclass": (lambda ps: Mine(ps, 0.1, fused=True), {}),
    "unfused by a checkpoint": (loaded_unfused, {}),
    "several coefficients": (MAKE["adamw"], {"groups": distclip.per_parameter()}),
    "asked not to": (MAKE["adamw"], {"fold": "never"}),
    "value clipping": (MAKE["adamw"], {"max_norm": None, "policy": distclip.FixedValue(0.01)}),
}


@pytest.mark.filterwarnings("ignore:value clipping turned the gradient")
@pytest.mark.parametrize("make, options", IN_PLACE.values(), ids=IN_PLACE)
def test_what_goes_in_place(make, options):
    net = model()
    give_grads(net, 0)
    clipper = distclip.GradClipper(net, **{"max_norm": 0.1} | options)
    assert not folds(make(net.parameters()), clipper)


def test_an_optimizer_with_parameters_of_its_own_goes_in_place():
    net, other = model(), nn.Parameter(torch.zeros(2))
    give_grads(net, 0)
    other.grad = torch.ones(2)
    optimizer = torch.optim.SGD([*net.parameters(), other], 1.0, fused=True)
    with pytest.warns(
        RuntimeWarning,
        match=r"^optimizer 0 \(SGD\) steps 1 parameter that this clipper does not "
        r"know \(the first has shape \(2,\)\): they",
    ):
        assert not folds(optimizer, distclip.GradClipper(net, 0.1))
    assert other.tolist() == [-1, -1], "what the clipper does not know is stepped unclipped"


def test_one_folds_and_the_other_does_not():
    net = model()
    reference = deepcopy(net)
    for m, fused in ((net, True), (reference, False)):
        give_grads(m, 0)
        first = torch.optim.AdamW(m[0].parameters(), 0.1, fused=fused)
        second = torch.optim.RMSprop(m[1].parameters(), 0.1)
        distclip.GradClipper(m, 0.5).step(first, second)
    for a, b in zip(net.parameters(), reference.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_an_error_in_the_optimizer_leaves_nothing_behind():
    net = model()
    give_grads(net, 0)
    optimizer = MAKE["adamw"](net.parameters())

    def fail(*_):
        raise RuntimeError("from a hook")

    optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="from a hook"):
        distclip.GradClipper(net, 0.5).step(optimizer)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_low_precision_parameters(name, dtype):
    """Fused SGD on the CPU loses elements of such parameters: it goes in place."""
    ends = []
    for fold in ("auto", "never"):
        net = model(dtype)
        optimizer = MAKE[name](net.parameters())
        clipper = distclip.GradClipper(net, 2.0**-3, fold=fold)
        give_grads(net, 0)
        clipper.step(optimizer)
        ends.append(torch.cat([p.detach().double().flatten() for p in net.parameters()]))
    assert (ends[0] - ends[1]).abs().max() <= 2 * torch.finfo(dtype).eps
