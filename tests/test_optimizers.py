"""What is passed as an optimizer: wrappers and containers are stepped themselves, once; what is
none is refused with what to write."""

import gc
import inspect
import math
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
import skips
from distclip.testing import count_collectives
from late import judged_late
from parity.layouts import given

SCALE = 8.0


class Noam:
    """No `Optimizer`, and it does more than forward: the learning rate is zero until its own step
    sets it."""

    def __init__(self, optimizer):
        self.optimizer, self.calls = optimizer, 0

    param_groups = property(lambda self: self.optimizer.param_groups)

    def step(self, closure=None):
        self.calls += 1
        for group in self.param_groups:
            group["lr"] = 0.25 * self.calls
        self.optimizer.step()


class Slotted:
    """As above, without room for a weak reference, and not hashable."""

    __slots__ = ("calls", "optimizer")
    __hash__ = None
    __init__ = Noam.__init__
    param_groups = Noam.param_groups
    step = Noam.step

    def __eq__(self, other):
        return False


class Free:
    """Keeps the optimizer under a name that nobody would look for."""

    def __init__(self, optimizer):
        self.of_yesterday, self.calls = [optimizer], 0

    param_groups = property(lambda self: self.of_yesterday[0].param_groups)

    @property
    def optimizers(self):
        raise RuntimeError("not to be read")

    def step(self, closure=None):
        self.calls += 1
        return self.of_yesterday[0].step(closure)


class Lookahead(torch.optim.Optimizer):
    """Of the kind that is an `Optimizer`: every second step it goes back half of the way."""

    def __init__(self, optimizer):
        self.base_optimizer, self.calls = optimizer, 0
        self.slow = None

    param_groups = property(lambda self: self.base_optimizer.param_groups)

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        self.slow = self.slow or [p.detach().clone() for p in params]
        for group in self.param_groups:
            group["lr"] = 0.5
        self.base_optimizer.step()
        self.calls += 1
        if self.calls % 2 == 0:
            with torch.no_grad():
                for p, slow in zip(params, self.slow):
                    p.copy_(slow.lerp_(p, 0.5))


class Hidden:
    """Says nothing of its parameters: they are those of the optimizers inside."""

    def __init__(self, optimizer):
        self.optimizers, self.calls = {"only": Noam(optimizer)}, 0

    def step(self):
        self.calls += 1
        self.optimizers["only"].step()


WRAPPERS = {"noam": Noam, "slots": Slotted, "lookahead": Lookahead, "hidden": Hidden}


def pairs(*grads, scale=1.0):
    named = []
    for i, grad in enumerate(grads):
        p = nn.Parameter(torch.ones(len(grad)))
        p.grad = torch.tensor(grad) * scale
        named.append((f"w{i}", p))
    return named


def scaler_of(enabled=True):
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=enabled)
    scaler.scale(torch.ones(()))
    return scaler


def trained(make, how, scaled, fused):
    """Three steps at half of each gradient; the parameters after each, and how often the wrapper
    stepped."""
    params, scaler = pairs([3.0], [4.0]), scaler_of(scaled)
    wrapper = make(torch.optim.SGD([p for _, p in params], 0.0, momentum=0.5, fused=fused))
    clipper, after = distclip.GradClipper(params, 2.5), []
    for _ in range(3):
        for (_, p), size in zip(params, (3.0, 4.0)):
            p.grad = torch.tensor([size]) * (SCALE if scaled else 1.0)
        if how == "unscale_ and step":
            scaler.unscale_(wrapper)
        if how == "by hand":
            for _, p in params:
                p.grad.mul_(0.5 / (SCALE if scaled else 1.0))
            wrapper.step()
        elif how == "clip_":
            assert clipper.clip_(wrapper, scaler).total_norm == 5
            scaler.step(wrapper)
            scaler.update()
        else:
            assert clipper.step(wrapper, scaler=scaler).total_norm == 5
        after.append([p.item() for _, p in params])
    return after, wrapper.calls


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("how", ["step", "clip_", "unscale_ and step"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_is_stepped_itself(make, scaled, how, fused):
    if make is Hidden and how.startswith("unscale_"):
        pytest.skip("torch's unscale_ reads param_groups")
    want, calls = trained(make, "by hand", scaled, fused)
    assert trained(make, how, scaled, fused) == (want, calls) and calls == 3
    assert len({tuple(row) for row in want}) == 3, "vacuous"


def test_a_wrapper_is_never_folded():
    params = pairs([3.0], [4.0])
    inner = torch.optim.AdamW([p for _, p in params], 0.1, fused=True)
    seen = []
    inner.register_step_pre_hook(
        lambda o, *_: seen.append(hasattr(o, "grad_scale") or hasattr(o, "found_inf"))
    )
    clipper = distclip.GradClipper(params, 2.5)
    judged_late(clipper, True)
    clipper.step(Noam(inner))
    assert seen == [False] and params[0][1].grad.item() == 1.5


@pytest.mark.parametrize("make", [Noam, Slotted, Lookahead, Free])
def test_what_is_inside_was_unscaled_and_the_wrapper_was_not(make):
    params, scaler = pairs([3.0, 4.0], scale=SCALE), scaler_of()
    inner = torch.optim.SGD([params[0][1]], 1.0)
    wrapper, clipper = make(inner), distclip.GradClipper(params, 2.5)
    scaler.unscale_(inner)
    for call in (
        lambda: clipper.step(wrapper, scaler=scaler),
        lambda: clipper.clip_(wrapper, scaler),
    ):
        with pytest.raises(distclip.ConfigError) as error:
            call()
        name = make.__name__
        assert str(error.value) == (
            f"the scaler has unscaled the SGD inside optimizer 0 ({name}), and knows nothing of "
            f"the {name} that was passed here: gradients "
            f"would be unscaled twice. Call scaler.unscale_() with the {name}, or leave unscaling "
            f"to the clipper"
        )
        assert params[0][1].grad.tolist() == [3, 4], "nothing was touched"


def test_after_clip_of_a_wrapper_the_scaler_may_step_what_is_inside():
    params, scaler = pairs([3.0, 4.0], scale=SCALE), scaler_of()
    inner = torch.optim.SGD([params[0][1]], 1.0)
    distclip.GradClipper(params, 2.5).clip_(Noam(inner), scaler)
    scaler.step(inner)
    assert params[0][1].tolist() == [1 - 1.5, 1 - 2.0]


@skips.told()
@pytest.mark.parametrize("how", ["step", "clip_"])
def test_an_overflow_under_a_wrapper_steps_nothing(how):
    params, scaler = pairs([3.0, math.inf]), scaler_of()
    wrapper, clipper = Noam(torch.optim.SGD([params[0][1]], 0.0)), distclip.GradClipper(params, 2.5)
    if how == "step":
        assert clipper.step(wrapper, scaler=scaler).skipped
    else:
        assert clipper.clip_(wrapper, scaler).skipped
        scaler.step(wrapper)
        scaler.update()
    assert (
        wrapper.calls == 0 and params[0][1].tolist() == [1, 1] and scaler.get_scale() == SCALE / 2
    )


# Wrappers of frameworks forward and do nothing else: they are looked through


def accelerated(optimizer, scaler):
    pytest.importorskip("accelerate").Accelerator(cpu=True)
    from accelerate.optimizer import AcceleratedOptimizer

    return AcceleratedOptimizer(
        optimizer, device_placement=False, scaler=scaler if scaler.is_enabled() else None
    )


def of_fabric(optimizer, scaler):
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    return fabric.setup_optimizers(optimizer)


FRAMEWORKS = {"accelerate": accelerated, "fabric": of_fabric}


@pytest.mark.usefixtures("of_frameworks")
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize("inside", [Noam, None])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("how", ["step", "clip_", "unscale_ the given", "unscale_ the inner"])
def test_frameworks_wrappers_are_looked_through(name, scaled, inside, how):
    if name == "fabric" and (inside or (scaled and how == "clip_")):
        pytest.skip(
            "Fabric takes torch's own optimizers alone, and its step knows no scaler but its own"
        )
    params, scaler = pairs([3.0], [4.0], scale=SCALE if scaled else 1.0), scaler_of(scaled)
    sgd = torch.optim.SGD([p for _, p in params], 0.25, fused=True)
    wrapped = inside(sgd) if inside else sgd
    outer, clipper, folded = (
        FRAMEWORKS[name](wrapped, scaler),
        distclip.GradClipper(params, 2.5),
        [],
    )
    sgd.register_step_pre_hook(
        lambda o, *_: folded.append(getattr(o, "grad_scale", None) is not None)
    )
    if how.startswith("unscale_"):
        scaler.unscale_(outer if "given" in how else wrapped)
    if how == "clip_":
        assert clipper.clip_(outer, scaler).total_norm == 5
        outer.step()
    else:
        assert clipper.step(outer, scaler=scaler).total_norm == 5
    assert [p.item() for _, p in params] == [1 - 0.25 * 1.5, 1 - 0.25 * 2.0]
    assert folded == [inside is None and how != "clip_"]
    assert not inside or wrapped.calls == 1


@pytest.mark.usefixtures("of_frameworks")
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
def test_a_wrapper_that_counts_its_steps_counts_folded_ones_too():
    params = pairs([3.0], [4.0])
    counted = []
    outer = of_fabric(torch.optim.AdamW([p for _, p in params], 0.25, fused=True), None)
    outer._callbacks = [
        type("Counter", (), {"on_after_optimizer_step": lambda *_, **__: counted.append(1)})()
    ]
    distclip.GradClipper(params, 2.5).step(outer)
    assert counted == [1]


# Containers of several optimizers


class Container(torch.optim.Optimizer):
    """One for each part of a model, stepped as one, with hooks of its own."""

    def __init__(self, parts, **options):
        self.optimizers = [torch.optim.AdamW(part, 0.1, **options) for part in parts]
        super().__init__([p for part in parts for p in part], {})

    def __iter__(self):
        return iter(self.optimizers)

    def __len__(self):
        return len(self.optimizers)

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()


def contained(star, how="step", scaled=False, fused=False):
    params, scaler = pairs([3.0], [4.0], scale=SCALE if scaled else 1.0), scaler_of(scaled)
    container, hooks = Container([[p] for _, p in params], fused=fused), []
    container.register_step_post_hook(lambda *_: hooks.append(1))
    clipper = distclip.GradClipper(params, 2.5)
    if how == "step":
        report = clipper.step(*(container if star else [container]), scaler=scaler)
    else:
        report = clipper.clip_(container, scaler)
        scaler.step(container)
        scaler.update()
    assert report.total_norm == 5
    return len(hooks), [p.item() for _, p in params], [p.grad.item() for _, p in params]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("how", ["step", "clip_"])
def test_a_container_is_stepped_itself(how, scaled, fused):
    hooks, after, grads = contained(False, how, scaled, fused)
    assert hooks == 1 and grads == [1.5, 2.0]
    reference = pairs([1.5], [2.0])
    for _, p in reference:
        torch.optim.AdamW([p], 0.1, fused=fused).step()
    assert after == [p.item() for _, p in reference] != [1, 1]


def test_with_a_star_its_own_step_never_runs():
    """Nothing of the container is seen then, which docs/migrating.md says."""
    assert contained(True)[0] == 0


def test_a_container_owns_what_its_optimizers_got_later():
    params, scaler = pairs([3.0], [4.0], scale=SCALE), scaler_of()
    container = Container([[params[0][1]]])
    container.optimizers[0].add_param_group({"params": [params[1][1]]})
    distclip.GradClipper(params, 2.5).step(container, scaler=scaler)
    assert [p.grad.item() for _, p in params] == [1.5, 2.0]


def test_a_container_and_one_of_its_optimizers():
    params = pairs([3.0], [4.0])
    container = Container([[p] for _, p in params])
    with pytest.raises(
        distclip.ConfigError,
        match=r"^step\(\) was given one optimizer twice; it "
        r"would step twice(\n|$)",
    ):
        distclip.GradClipper(params, 2.5).step(container, container.optimizers[0])


def test_wrappers_are_not_kept_alive():
    params = pairs([3.0], [4.0])
    clipper = distclip.GradClipper(params, 2.5)
    wrapper = Noam(torch.optim.SGD([p for _, p in params], 0.1))
    clipper.step(wrapper)
    gone = weakref.ref(wrapper), weakref.ref(wrapper.optimizer)
    del wrapper
    gc.collect()
    assert [r() for r in gone] == [None, None] and not clipper._stages.requests.index._entries


# What is passed beside what is meant: refused, on all ranks, before anything is touched

CLOSURE = (
    "clip inside the closure instead: def closure(): optimizer.zero_grad(); loss = ...; "
    "loss.backward(); clipper.clip_(); return loss, "
    "and then optimizer.step(closure)"
)


class SAM(torch.optim.SGD):
    def first_step(self, zero_grad=False): ...

    def second_step(self, zero_grad=False): ...

    def step(self, closure=None):
        assert closure is not None


class NeedsLoss(torch.optim.SGD):
    def step(self, closure=None, *, loss):
        super().step()


def lbfgs(p):
    return torch.optim.LBFGS([p])


def loss():
    return torch.ones(())


ON_STEP = {
    "lbfgs": (lambda c, p: c.step(lbfgs(p)), f"LBFGS.step() needs closure, and the clipper calls "
                                             f"it once, with nothing; {CLOSURE}"),
    "lbfgs in a framework's wrapper": (
        lambda c, p: c.step(accelerated(lbfgs(p), scaler_of(False))),
        f"LBFGS.step() needs closure, and the clipper calls it once, with nothing; {CLOSURE}",
    ),
    "lbfgs in a wrapper that takes a closure": (
        lambda c, p: c.step(Free(lbfgs(p))),
        f"Free.step() needs closure, and the clipper calls it once, with nothing; {CLOSURE}",
    ),
    "sam": (
        lambda c, p: c.step(SAM([p], 1.0)),
        f"SAM.step() takes two steps with a closure between them, and the clipper calls it once, "
        f"with nothing; {CLOSURE}",
    ),
    "a keyword": (
        lambda c, p: c.step(NeedsLoss([p], 1.0)),
        f"NeedsLoss.step() needs loss, and the clipper calls it once, with nothing; {CLOSURE}",
    ),
    "closure": (
        lambda c, p: c.step(torch.optim.SGD([p], 1.0), loss),
        f"step() was given a function in an optimizer's place, and takes no closure; {CLOSURE}",
    ),
    "scaler": (
        lambda c, p: c.step(torch.optim.SGD([p], 1.0), scaler_of()),
        "step() was given a GradScaler in an optimizer's place; write step(optimizer, "
        "scaler=scaler) or clip_(optimizer, scaler)",
    ),
    "clip_(scaler)": (
        lambda c, p: c.clip_(scaler_of()),
        "clip_() was given a GradScaler in an optimizer's place; write step(optimizer, "
        "scaler=scaler) or clip_(optimizer, scaler)",
    ),
    "the other way round": (
        lambda c, p: c.clip_(torch.optim.SGD([p], 1.0), torch.optim.SGD([p], 1.0)),
        "scaler= was given a SGD; it is a torch.amp.GradScaler, and optimizers stand before it: "
        "step(optimizer, scaler=scaler), "
        "clip_(optimizer, scaler)",
    ),
    "scheduler": (
        lambda c, p: c.step(torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([p], 1.0))),
        "step() was given a ConstantLR, which schedules learning rates; pass the optimizer, and "
        "call scheduler.step() afterwards",
    ),
    "a list": (
        lambda c, p: c.step([torch.optim.SGD([p], 1.0)]),
        "step() was given a list; pass optimizers one by one: step(*optimizers)",
    ),
    "the class": (lambda c, p: c.step(torch.optim.SGD), "step() was given the class SGD; pass an "
                                                        "optimizer that was built from it"),
    "the model": (
        lambda c, p: c.step(nn.Linear(2, 2)),
        "step() was given a Linear, which is a module: the clipper knows its parameters already. "
        "Pass optimizers",
    ),
    "parameters": (
        lambda c, p: c.clip_(iter([p])),
        "clip_() was given a tensor; the clipper knows its parameters already. Pass optimizers, or "
        "nothing to clip_()",
    ),
    "a threshold": (
        lambda c, p: c.clip_(1.0),
        "clip_() was given 1.0; the threshold is said once, GradClipper(model, max_norm=...). Pass "
        "optimizers, or nothing to clip_()",
    ),
    "a table": (
        lambda c, p: c.clip_({"a": torch.optim.SGD([p], 1.0)}),
        "clip_() was given a dict; pass optimizers one by one: step(*optimizers)",
    ),
    "no factor": (
        lambda c, p: c.step(torch.optim.SGD([p], 1.0), grad_scale=None),
        "grad_scale=None must be positive and finite",
    ),
    "none": (
        lambda c, p: c.step(None),
        "step() was given None, which is no optimizer: it has no step(), or names no parameters to "
        "step",
    ),
    "something else": (
        lambda c, p: c.step(object()),
        "step() was given a object, which is no optimizer: it has no step(), or names no "
        "parameters to step",
    ),
    "the same twice": (lambda c, p: c.clip_([o := torch.optim.SGD([p], 1.0), o]), "clip_() was "
                                                                                  "given one "
                                                                                  "optimizer twice"),
}  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize("waits", [False, True, "device"])
@pytest.mark.parametrize("call, text", ON_STEP.values(), ids=ON_STEP)
def test_refused_before_a_gradient_is_touched(call, text, waits):
    params = pairs([3.0, 4.0])
    p = params[0][1]
    clipper = distclip.GradClipper(params, 2.5)
    judged_late(clipper, waits)
    with pytest.raises(distclip.ConfigError) as error:
        call(clipper, p)
        clipper.measure()  # where the host waits for nothing it is told at the next call
    assert str(error.value) == text and p.grad.tolist() == [3, 4] and p.tolist() == [1, 1]


def passed_on_one_rank():
    name, p = given("w", 4)
    before, optimizer = p.grad.clone(), torch.optim.SGD([p], 1.0)
    clipper, said = distclip.GradClipper([(name, p)], 0.01), []
    for odd in (
        lambda: clipper.step(optimizer, loss),
        lambda: clipper.step(torch.optim.LBFGS([p])),
    ):
        usual = lambda: clipper.step(optimizer)  # noqa: E731
        with count_collectives() as seen:
            try:
                (odd if dist.get_rank() == 2 else usual)()
            except distclip.AgreementError as error:
                said.append((str(error), seen.names[0]))
    return said, torch.equal(before, p.grad) and not p.any()


def test_a_wrong_argument_on_one_rank_is_told_on_all(ranks):
    rows = ranks.run(passed_on_one_rank)
    for said, stood in rows:
        assert stood and [name for _, name in said] == ["allreduce_"] * 2
        assert (
            "rank 2: at step 1: step [step() was given a function in an optimizer's place"
            in said[0][0]
        )
        assert "rank 2: at step 2: step with 1 optimizer [LBFGS.step() needs closure" in said[1][0]
    assert all(row == rows[0] for row in rows)


@pytest.mark.filterwarnings(
    "ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning"
)  # LBFGS of torch 2.8
def test_clipping_inside_the_closure_is_what_a_clip_by_hand_is():
    """What the refusal says to do."""
    ends = []
    for ours in (True, False):
        torch.manual_seed(0)
        net, x = nn.Linear(4, 2), torch.randn(8, 4)
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)
        clipper, clipped = distclip.GradClipper(net, 0.5), []

        def closure(net=net, x=x, optimizer=optimizer, clipper=clipper, clipped=clipped, ours=ours):
            optimizer.zero_grad()
            value = net(x).square().sum()
            value.backward()
            if ours:
                clipped.append(bool(clipper.clip_().clipped))
            else:
                norm = (
                    torch.cat([p.grad.double().flatten() for p in net.parameters()]).norm().item()
                )
                for p in net.parameters():
                    p.grad.copy_(p.grad.double() * min(1.0, 0.5 / norm))
            return value

        optimizer.step(closure)
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
        assert not ours or any(clipped), "vacuous"
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_schedulers_and_patched_steps_are_no_reason_to_refuse():
    """A scheduler puts a function of another signature on the optimizer; a step of the user's own
    is his affair."""
    params = pairs([3.0, 4.0])
    optimizer = torch.optim.SGD([params[0][1]], 1.0)
    torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5)
    assert "self" in inspect.signature(optimizer.step).parameters, "vacuous"
    distclip.GradClipper(params, 2.5).step(optimizer)
    assert params[0][1].tolist() == [1 - 0.75, 1 - 1.0]
    own = torch.optim.LBFGS([params[0][1]])
    own.step = lambda: calls.append(1)
    calls = []
    distclip.GradClipper(params, 2.5).step(own)
    assert calls == [1]


class Assigns:
    """A grouping that is not derived from `Grouping`."""

    def assign(self, names, params):
        return ["all"] * len(names)


ON_BUILDING = {
    "optimizer": (
        lambda: distclip.GradClipper(torch.optim.SGD(nn.Linear(2, 2).parameters(), 1.0), max_norm=1.0),
        "params is a SGD, an optimizer; pass what it steps, GradClipper(model, max_norm=...), and "
        "the optimizer to clipper.step(optimizer)",
    ),
    "container": (
        lambda: distclip.GradClipper(Container([list(nn.Linear(2, 2).parameters())]), max_norm=1.0),
        "params is a Container, an optimizer; pass what it steps, GradClipper(model, "
        "max_norm=...), and the optimizer to "
        "clipper.step(optimizer)",
    ),
    "no order": (
        lambda: distclip.GradClipper(nn.Linear(2, 2), 1.0, norm_type=None),
        "norm_type=None: p must be above 0 and at most 8, or math.inf",
    ),
    "a dict": (
        lambda: distclip.GradClipper(dict(nn.Linear(2, 2).named_parameters()), max_norm=1.0),
        "params is a dict; pass its (name, parameter) pairs: GradClipper(params.items(), ...)",
    ),
    "a number": (
        lambda: distclip.GradClipper(1.0, max_norm=1.0),
        "params is a float; pass an nn.Module, a list of modules, (name, parameter) pairs or "
        "parameters",
    ),
    "max_norm": (
        lambda: distclip.GradClipper(nn.Linear(2, 2), torch.optim.SGD(nn.Linear(2, 2).parameters(), 1.0)),
        "max_norm is a SGD; it is a number, the threshold of the norm: GradClipper(model, "
        "max_norm=1.0)",
    ),
    "the class of a policy": (
        lambda: distclip.GradClipper(nn.Linear(2, 2), policy=distclip.ZClip),
        "policy=ZClip is the class; call it: policy=distclip.ZClip(...)",
    ),
    "the class in a table": (
        lambda: distclip.GradClipper(nn.Linear(2, 2), 1.0, groups=distclip.by_name({"weight": distclip.AutoClip})),
        "groups: the rule of 'weight' is AutoClip, the class; call it: distclip.AutoClip(...)",
    ),
    "a grouping that was not called": (
        lambda: distclip.GradClipper(nn.Linear(2, 2), 1.0, groups=distclip.per_layer),
        "groups=per_layer is the function; call it: groups=distclip.per_layer()",
    ),
    "a table": (
        lambda: distclip.GradClipper(nn.Linear(2, 2), 1.0, groups={"weight": 1.0}),
        "groups is a dict; pass distclip.by_name({pattern: threshold or policy}), per_parameter(), "
        "per_layer() or "
        "per_param_group(optimizer)",
    ),
    "a grouping that lacks something": (
        lambda: distclip.GradClipper(nn.Linear(2, 2), 1.0, groups=Assigns()),
        "groups is a Assigns without rules, patterns, needs, cuts; derive it from "
        "distclip.groups.Grouping, which has them",
    ),
    "the same, watched": (
        lambda: distclip.Watch(Assigns()),
        "Watch: groups is a Assigns without rules, patterns, needs, cuts; derive it from "
        "distclip.groups.Grouping, which has them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("make, text", ON_BUILDING.values(), ids=ON_BUILDING)
def test_refused_when_built(make, text):
    with pytest.raises(distclip.ConfigError) as error:
        make()
    assert str(error.value) == text


def built_on_one_rank(what):
    try:
        make = (
            ON_BUILDING[what][0]
            if dist.get_rank() == 1
            else lambda: distclip.GradClipper(nn.Linear(2, 2), 1.0)
        )
        make()
    except distclip.DistclipError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("what", ["optimizer", "max_norm", "the class of a policy", "a number"])
def test_wrong_on_one_rank_is_told_on_all(ranks, what):
    for rank, text in enumerate(ranks.run(built_on_one_rank, what)):
        start = (
            "ConfigError: "
            if rank == 1
            else "AgreementError: another rank could not build its GradClipper:\nrank 1: "
            "ConfigError: "
        )
        assert text == start + ON_BUILDING[what][1]


class SteppingModule(torch.optim.SGD, nn.Module):
    """A module all the same."""


@pytest.mark.parametrize("call", ["clip_", "step"])
@pytest.mark.parametrize("kind", ["a module", "no step"])
def test_what_looks_like_one_of_torchs_optimizers_is_looked_at_too(call, kind):
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    optimizer = (SteppingModule if kind == "a module" else torch.optim.SGD)([p], 1.0)
    if kind == "no step":
        optimizer.step = None
    clipper = distclip.GradClipper([("p", p)], 1.0)
    words = "which is no optimizer" if kind == "no step" else "is a module|a SteppingModule"
    with pytest.raises(distclip.ConfigError, match=words):
        getattr(clipper, call)(optimizer)
    assert p.grad.tolist() == [3.0, 4.0]
