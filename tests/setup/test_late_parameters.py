"""Parameters that join the model or the optimizer after the clipper was built are told, on all
ranks; what joins elsewhere is not."""

import copy
import gc
import math
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.modules import module as torch_modules
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.nn.utils.parametrize import register_parametrization

import distclip
import skips
from distclip.setup import late_parameters
from distclip.setup.late_parameters import REGISTRATIONS, LateParameters
from distclip.testing import count_collectives
from parity.oracle import total_norm


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 5, bias=False), nn.Linear(5, 3)
        self.extra, self.layers = (
            nn.ParameterList([nn.Parameter(torch.ones(2))]),
            nn.ModuleList([nn.Linear(3, 3)]),
        )
        self.rest = nn.Sequential(nn.Linear(3, 2))

    def forward(self, x):
        return self.rest(self.layers[0](self.head(self.body(x).relu())))


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.a, self.b = (
            base,
            nn.Parameter(torch.ones(2, base.in_features)),
            nn.Parameter(torch.ones(base.out_features, 2)),
        )
        base.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


def put(net, name, value):
    setattr(net, name, value)


JOINS = {
    "a head": (lambda net: put(net, "two", nn.Linear(5, 3)), r"two\.weight joined .*\(2 in all\)"),
    "a bias": (lambda net: put(net.body, "bias", nn.Parameter(torch.ones(5))), r"body\.bias joined "
                                                                               r".*\(1 in all\)"),
    "an entry of a ParameterList": (lambda net: net.extra.append(nn.Parameter(torch.ones(2))), r"extra\.1 joined"),
    "an entry of a ModuleList": (lambda net: net.layers.append(nn.Linear(3, 3)), r"layers\.1\.weight joined"),
    "inserted at the end of a ModuleList": (lambda net: net.layers.insert(1, nn.Linear(3, 3)), r"layers\.1\.weight joined"),
    "inserted at the end of a Sequential": (lambda net: net.rest.insert(1, nn.Linear(2, 2)), r"rest\.1\.weight joined"),
    "a copy": (lambda net: put(net.rest, "again", copy.deepcopy(net.head)), r"rest\.again\.weight "
                                                                            r"joined"),
    "register_parameter": (lambda net: net.register_parameter("scale", nn.Parameter(torch.ones(()))), r"scale joined"),
    "add_module": (lambda net: net.head.add_module("gate", nn.Linear(1, 1)), r"head\.gate\.weight "
                                                                             r"joined"),
    "weight_norm as a parametrization": (
        lambda net: parametrizations.weight_norm(net.head), r"head\.parametrizations\.weight\.original0 joined .*\(2 in all\)",
    ),
    "an adapter in a layer's place": (lambda net: put(net, "head", LoRA(net.head)), r"head was replaced"),
    "an adapter beside a layer": (lambda net: put(net.head, "lora_a", nn.Parameter(torch.ones(2, 5))), r"head\.lora_a joined"),
    "another layer": (lambda net: put(net, "head", nn.Linear(5, 3)), r"head was replaced"),
    "another parameter": (lambda net: put(net.head, "bias", nn.Parameter(torch.ones(3))), r"head\.bias was replaced"),
}  # fmt: skip


def spread(net, seed=0):
    """A random gradient for all that is trainable."""
    draw = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=draw) if p.requires_grad else None


def norm(net):
    return total_norm([p.grad for p in net.parameters() if p.grad is not None])


def after(optimizer, net):
    """The parameters that the optimizer lacks join it."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if missing := [p for p in net.parameters() if id(p) not in held]:
        optimizer.add_param_group({"params": missing})


@pytest.mark.parametrize("act", ["step", "clip_", "measure"])
@pytest.mark.parametrize("join, text", JOINS.values(), ids=JOINS)
def test_what_joins_is_told_and_clipped_after_rebuild(join, text, act):
    net = Net()
    optimizer, clipper = (
        torch.optim.SGD(net.parameters(), 0.1),
        distclip.GradClipper(net, policy=distclip.ZClip(warmup=2)),
    )
    for seed in range(3):
        spread(net, seed)
        clipper.step(optimizer)
    state, steps = (
        [t.clone() for part in clipper._state.policies for t in part],
        clipper._state.step,
    )
    optimizer.zero_grad()
    join(net)
    after(optimizer, net)
    for _ in range(2):  # it stays an error
        spread(net)
        before = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        with pytest.raises(
            distclip.GradientError,
            match=text + r".*call clipper\.rebuild\(\) on "
            r"all ranks",
        ):
            clipper.step(optimizer) if act == "step" else getattr(clipper, act)()
        assert all(
            g is None or torch.equal(g, p.grad)
            for g, p in zip(before, net.parameters(), strict=True)
        )
    clipper.rebuild()
    assert (
        all(map(torch.equal, state, [t for part in clipper._state.policies for t in part]))
        and clipper._state.step == steps + 2
    )
    want = norm(net)
    report = clipper.step(optimizer)
    assert report.total_norm.item() == pytest.approx(want, rel=1e-6) and want > 1
    assert norm(net) == pytest.approx(want * report.clip_coef.item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_old_weight_norm():
    net = Net()
    clipper = distclip.GradClipper(net, 1.0)
    weight_norm(net.head)
    spread(net)
    with pytest.raises(distclip.GradientError, match=r"head\.weight_g joined .*\(2 in all\)"):
        clipper.clip_()


# Quiet


class Symmetric(nn.Module):
    def forward(self, w):
        return w + 1


QUIET = {
    "a module elsewhere": lambda net: Net(),
    "a copy elsewhere": lambda net: copy.deepcopy(net),
    "a frozen head": lambda net: put(net, "two", nn.Linear(5, 3).requires_grad_(False)),
    "integers": lambda net: put(
        net, "table", nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False)
    ),
    "a buffer": lambda net: net.register_buffer("mean", torch.ones(3)),
    "no parameter": lambda net: put(net, "two", nn.GELU()),
    "None": lambda net: net.register_parameter("nothing", None),
    "a tie": lambda net: put(net.rest, "tied", net.head.weight),
    "the same again": lambda net: put(net.head, "weight", net.head.weight),
    "a parametrization of what is there": lambda net: register_parametrization(
        net.head, "weight", Symmetric()
    ),
    "pruning": lambda net: prune.l1_unstructured(net.head, "weight", 0.3),
    "put and taken away": lambda net: (put(net, "two", nn.Linear(5, 3)), delattr(net, "two")),
}


@pytest.mark.parametrize("change", QUIET.values(), ids=QUIET)
def test_what_is_no_newcomer(change):
    net = Net()
    optimizer, clipper = torch.optim.SGD(net.parameters(), 0.1), distclip.GradClipper(net, 0.5)
    trainable = [p for p in net.parameters() if p.requires_grad]
    change(net)
    for seed in range(2):
        spread(net, seed)
        want = total_norm([p.grad for p in trainable])
        assert (
            clipper.step(optimizer).total_norm.item() == pytest.approx(want, rel=1e-6)
            and want > 0.5
        )


def test_frozen_and_unused_newcomers_are_waited_for():
    net = Net()
    optimizer, clipper = torch.optim.SGD(net.parameters(), 0.1), distclip.GradClipper(net, 0.5)
    net.two = nn.Linear(5, 3).requires_grad_(False)
    spread(net)
    clipper.step(optimizer)
    net.two.requires_grad_(True)
    clipper.step(optimizer)  # it has no gradient yet
    net.two.bias.grad = torch.ones(3)
    with pytest.raises(distclip.GradientError, match=r"two\.bias joined .*\(1 in all\)"):
        clipper.step(optimizer)
    with pytest.raises(distclip.GradientError, match=r"two\.weight joined .*\(2 in all\)"):
        clipper.measure(of="param")
    del net.two
    clipper.step(optimizer)


def test_unfreezing_what_is_known_goes_on_working():
    net = Net()
    net.body.requires_grad_(False)
    optimizer, clipper = torch.optim.SGD(net.parameters(), 0.1), distclip.GradClipper(net, 0.5)
    spread(net)
    clipper.step(optimizer)
    net.body.requires_grad_(True)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2), requires_grad=False)]})
    spread(net)
    want = norm(net)
    assert clipper.step(optimizer).total_norm.item() == pytest.approx(want, rel=1e-6) and want > 0.5


@pytest.mark.parametrize("knows", [True, False])
def test_gradients_elsewhere(knows):
    net = Net()
    spread(net)
    elsewhere = {id(p): p.grad for p in net.parameters()}
    clipper = distclip.GradClipper(
        net, 0.5, grad_of=lambda p: elsewhere.get(id(p)) if knows else elsewhere[id(p)]
    )
    net.two = nn.Linear(5, 3)
    if knows:
        clipper.decide()
        elsewhere[id(net.two.bias)] = torch.ones(3)
    with pytest.raises(
        distclip.GradientError, match=r"two\.bias joined" if knows else r"two\.weight joined"
    ):
        clipper.decide()


def test_modules_are_looked_at_when_something_was_registered_and_no_more_often(monkeypatch):
    net = Net()
    optimizer, clipper = torch.optim.SGD(net.parameters(), 0.1), distclip.GradClipper(net, 0.5)
    looks, walks, look, walk = (
        [],
        [],
        LateParameters._compare_modules,
        late_parameters.module_entries,
    )
    monkeypatch.setattr(
        LateParameters, "_compare_modules", lambda self: (looks.append(1), look(self))
    )
    monkeypatch.setattr(
        late_parameters, "module_entries", lambda modules: (walks.append(1), walk(modules))[1]
    )

    def steps():
        for seed in range(4):
            spread(net, seed)
            clipper.step(optimizer)
        return len(looks), len(walks)

    assert steps() == (0, 0)
    nn.Linear(2, 2)
    assert steps() == (1, 0), "a module elsewhere: one comparison of what the tables hold"
    net.frozen = nn.Linear(2, 2).requires_grad_(False)
    assert steps() == (2, 1), "one walk"
    net.listed = nn.ModuleList([nn.Linear(2, 2).requires_grad_(False)])
    net.listed.append(nn.ReLU())
    assert steps() == (3, 2)
    net.listed.append(nn.Linear(2, 2).requires_grad_(False))
    assert steps() == (4, 3), "what joined what joined later is seen, once"
    assert steps() == (4, 3)


def test_torchs_hooks_are_there_as_long_as_a_clipper_is():
    def hooks():
        gc.collect()
        every = (
            torch_modules._global_parameter_registration_hooks,
            torch_modules._global_module_registration_hooks,
        )
        return [sum(hook is REGISTRATIONS for hook in kind.values()) for kind in every]

    before = hooks()
    one, two = distclip.GradClipper(Net(), 1.0), distclip.GradClipper(Net(), 1.0)
    assert hooks() == [1, 1]
    one.rebuild()
    del one
    assert hooks() == [1, 1]
    del two
    assert hooks() == before


# Sharding frameworks swap parameters themselves: each strategy's hundred steps in
# precision/test_strategies.py raise no alarm


def on_ranks(layout):
    """Rank 2 alone gets a head, or all do; then the clipper is rebuilt."""
    torch.manual_seed(0)
    net = Net()
    if layout == "fsdp2":
        fully_shard(net.head)
        fully_shard(net)
    model = DDP(net, find_unused_parameters=True) if layout == "ddp" else net
    optimizer, clipper = torch.optim.SGD(net.parameters(), 0.1), distclip.GradClipper(model, 0.1)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        clipper.step(optimizer)
    if dist.get_rank() == 2 or layout == "fsdp2":
        net.two = nn.Linear(5, 3) if layout == "ddp" else fully_shard(nn.Linear(5, 3))
    optimizer.zero_grad()
    model(x).square().sum().backward()
    if hasattr(net, "two"):
        for p in net.two.parameters():
            p.grad = p.detach().clone()
    with count_collectives() as seen:
        try:
            clipper.step(optimizer)
        except distclip.GradientError as error:
            text, sent = str(error), seen.names[0]
    if layout == "fsdp2":
        clipper.rebuild()
        want = total_norm([p.grad.full_tensor() for p in net.parameters() if p.grad is not None])
        optimizer.add_param_group({"params": net.two.parameters()})
        return text, sent, clipper.step(optimizer).total_norm.item() / want
    return text, sent, 1.0


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_told_on_all_ranks(ranks, layout):
    rows = ranks.run(on_ranks, layout)
    who = "0-3" if layout == "fsdp2" else "2"
    for text, sent, ratio in rows:
        assert sent == "allreduce_" and ratio == pytest.approx(1.0, rel=1e-6)
        assert text == (
            f"step 4: rank {who}: two.weight joined the model after the clipper was built (2 in "
            f"all); call clipper.rebuild() on all ranks"
        )


# The optimizer's own groups


def points(*sizes):
    named = {}
    for i, size in enumerate(sizes):
        named[f"p{i}"] = p = nn.Parameter(torch.ones(size))
        p.grad = torch.full((size,), 5.0)
    return named


def test_a_group_that_the_optimizer_got_later():
    named, more = points(3), points(4)["p0"]
    optimizer = torch.optim.SGD(named.values(), 0.1)
    clipper = distclip.GradClipper(named.items(), 0.1)
    clipper.step(optimizer)
    optimizer.add_param_group({"params": [more]})
    named["more"] = more
    for call in (lambda: clipper.step(optimizer), lambda: clipper.clip_(optimizer)):
        with pytest.raises(distclip.GradientError) as error:
            call()
        assert str(error.value).partition(": ")[2] == (
            "rank 0: optimizer 0 (SGD) was given 1 parameter later that this clipper does not know "
            "(the first: shape (4,)); call "
            "clipper.rebuild() on all ranks, with the parameters as they are now where pairs or a "
            "list were passed: clipper.rebuild(params)"
        )
        assert more.tolist() == [1] * 4
    clipper.rebuild()  # the pairs were passed as a view of the dictionary, which has the new one
    assert clipper.step(optimizer).total_norm.item() == pytest.approx(
        math.sqrt(0.1**2 + 100), rel=1e-6
    )


def test_groups_that_are_cleared_and_filled_again():
    """As many parameters in a new list: it may lie where the old one lay."""
    known, unknown = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer, clipper = torch.optim.SGD(known.parameters(), 0.1), distclip.GradClipper(known, 0.1)
    for layers in (known, unknown):
        layers(torch.ones(1, 4)).sum().backward()
    clipper.step(optimizer)
    for _ in range(20):
        optimizer.param_groups.clear()
        optimizer.add_param_group({"params": list(unknown.parameters())})
        with pytest.raises(
            distclip.GradientError,
            match=r"was given 2 parameters later that this "
            r"clipper does not know",
        ):
            clipper.step(optimizer)
        optimizer.param_groups.clear()
        optimizer.add_param_group({"params": list(known.parameters())})
        clipper.step(optimizer)


def test_a_tensor_that_took_anothers_place():
    named = points(3)
    optimizer = torch.optim.SGD(named.values(), 0.1)
    clipper = distclip.GradClipper(list(named.items()), 0.1)
    clipper.step(optimizer)
    new = named["p0"] = optimizer.param_groups[0]["params"][0] = points(5)["p0"]
    for call in (lambda: clipper.step(optimizer), lambda: clipper.clip_([optimizer])):
        with pytest.raises(
            distclip.GradientError,
            match=r"the first: shape \(5,\)\); call clipper\.rebuild\(\) "
            r".*clipper\.rebuild\(params\)",
        ):
            call()
    assert new.tolist() == [1] * 5
    with pytest.raises(distclip.ConfigError, match="an optimizer; pass what it steps"):
        clipper.rebuild(optimizer)
    clipper.rebuild(named.items())
    assert clipper.step(optimizer).total_norm.item() == pytest.approx(math.sqrt(125), rel=1e-6)
    clipper.rebuild()
    assert clipper.clip_().total_norm.item() == pytest.approx(0.1, rel=1e-6), "what was passed last"


def test_names_of_the_optimizer_are_told():
    named = points(3)
    optimizer = torch.optim.SGD(list(named.items()), 0.1)
    clipper = distclip.GradClipper(named.items(), 0.1)
    clipper.step(optimizer)
    optimizer.add_param_group({"params": [("scale", points(4)["p0"])]})
    with pytest.raises(distclip.GradientError, match=r"\(the first: scale\)"):
        clipper.step(optimizer)


@pytest.mark.parametrize("of", ["module", "pairs"])
def test_a_group_that_is_taken_back_and_one_that_is_frozen(of):
    net = Net()
    spread(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    clipper = distclip.GradClipper(net if of == "module" else net.named_parameters(), 0.1)
    clipper.step(optimizer)
    late = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer.add_param_group({"params": [late]})
    clipper.step(optimizer)
    late.requires_grad_(True)
    with pytest.raises(distclip.GradientError, match=r"the first: shape \(2,\)"):
        clipper.step(optimizer)
    optimizer.param_groups.pop()
    clipper.step(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    clipper.step(optimizer)


# A subset that is meant


MORE = (
    "optimizer 0 (SGD) steps 1 parameter that this clipper does not know (the first has shape "
    "(4,)): they are neither clipped nor in the "
    "norm. Build the clipper with them if that is not meant"
)


def subset(fused=None, **options):
    named = points(3, 4)
    optimizer = torch.optim.SGD(named.values(), 0.1, fused=fused)
    clipper = distclip.GradClipper([("p0", named["p0"])], 0.1, **options)
    return named["p0"], named["p1"], optimizer, clipper


def test_a_subset_is_told_once_and_legal():
    p, q, optimizer, clipper = subset()
    with pytest.warns(RuntimeWarning) as warned:
        clipper.step(optimizer)
    assert [str(w.message) for w in warned] == [MORE]
    p.grad = torch.full((3,), 5.0)
    assert clipper.step(optimizer).total_norm.item() == pytest.approx(math.sqrt(75)), (
        "and no second time"
    )
    assert q.tolist() == pytest.approx([0.0] * 4, abs=1e-6)


@pytest.mark.filterwarnings(
    "ignore:optimizer 0 .* steps 1 parameter that this clipper does not know"
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("frozen_first", [False, True])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("how", ["step", "clip_", "unscale_ and step"])
@pytest.mark.parametrize("scaled", [False, True])
@skips.told()
def test_what_is_not_finite_beside_a_subset_is_never_stepped(scaled, how, fused, frozen_first, bad):
    p, q, optimizer, clipper = subset(fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)

    def step(value):
        scaler.scale(torch.ones(()))
        scale = scaler.get_scale() if scaled else 1.0
        p.grad, q.grad = (
            torch.full((3,), 0.01 * scale),
            torch.tensor([value, 1.0, 1.0, 1.0]) * scale if q.requires_grad else None,
        )
        if how.startswith("unscale_"):
            scaler.unscale_(optimizer)
        if how != "clip_":
            return clipper.step(optimizer, scaler=scaler)
        report = clipper.clip_(optimizer, scaler)
        scaler.step(optimizer)
        scaler.update()
        return report

    if frozen_first:
        q.requires_grad_(False)
        step(0.0)
        q.requires_grad_(True)
    before = [p.tolist(), q.tolist()]
    assert step(bad).skipped and [p.tolist(), q.tolist()] == before
    assert not step(1.0).skipped
    assert q.tolist() == pytest.approx([0.9] * 4), "unscaled once, and not clipped"


@pytest.mark.filterwarnings(
    "ignore:optimizer 0 .* steps 1 parameter that this clipper does not know"
)
def test_propagate_looks_at_what_is_clipped_alone():
    _, q, optimizer, clipper = subset(on_nonfinite="propagate")
    q.grad[0] = math.nan
    report = clipper.step(optimizer)
    assert (
        not report.skipped and report.nonfinite == 0 and report.clipped and math.isnan(q[0].item())
    )


def beside_on_one_rank():
    torch.manual_seed(0)
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
    optimizer, clipper = torch.optim.SGD([p, q], 0.1), distclip.GradClipper([("p", p)], 0.1)
    p.grad, q.grad = torch.full((3,), 5.0), torch.ones(4)
    with pytest.warns(RuntimeWarning) as warned:
        clipper.step(optimizer)
    if dist.get_rank() == 3:
        q.grad[1] = math.nan
    before = [*p.tolist(), *q.tolist()]
    with count_collectives() as seen, skips.told() as told:
        skipped = bool(clipper.step(optimizer).skipped)
    return (
        [str(w.message) for w in warned],
        told.texts,
        skipped and before == [*p.tolist(), *q.tolist()],
        seen.names[:1],
    )


def test_a_nan_beside_a_subset_on_one_rank_is_skipped_on_all(ranks):
    for warned, told, stood, sent in ranks.run(beside_on_one_rank):
        assert warned == [MORE] and stood and sent == ["allreduce_"]
        assert told[0].startswith(
            "step 2 is skipped: 1 gradient tensor is not finite: only their "
            "sum overflows, or it is of a parameter"
        )


@pytest.mark.parametrize("how", ["clip_", "step"])
def test_what_grad_of_hides_is_unscaled_with_the_rest(how):
    """A part of the model is clipped; the scaler takes the whole optimizer for unscaled after
    it."""
    named, scaler = points(3, 4), torch.amp.GradScaler("cpu", init_scale=8.0)
    p, q = named.values()
    scaler.scale(torch.ones(()))
    p.grad, q.grad = torch.full((3,), 8.0), torch.full((4,), 8.0)
    optimizer = torch.optim.SGD([p, q], 0.5)
    clipper = distclip.GradClipper(named.items(), 1.0, grad_of=lambda w: w.grad if w is p else None)
    if how == "clip_":
        report = clipper.clip_(optimizer, scaler)
        scaler.step(optimizer)
        scaler.update()
    else:
        report = clipper.step(optimizer, scaler=scaler)
    assert report.total_norm.item() == pytest.approx(math.sqrt(3))
    assert p.tolist() == pytest.approx([1 - 0.5 / math.sqrt(3)] * 3) and q.tolist() == [0.5] * 4


@skips.told()
def test_what_grad_of_hides_has_to_be_finite_too():
    named = points(3, 4)
    p, q = named.values()
    optimizer = torch.optim.SGD([p, q], 0.5)
    clipper = distclip.GradClipper(named.items(), 1.0, grad_of=lambda w: w.grad if w is p else None)
    q.grad[2] = math.nan
    assert clipper.clip_(optimizer).skipped
    optimizer.step()
    assert p.tolist() == [1] * 3 and q.tolist() == [1] * 4, (
        "a step that is skipped is skipped as a whole"
    )


# In frameworks' loops


class Grows:
    """One layer, and from the third call on a second one, which joins the optimizer."""

    def __init__(self, net, add_param_group):
        self.net, self.add_param_group, self.calls = net, add_param_group, 0

    def __call__(self, x):
        self.calls += 1
        if self.calls == 3:
            self.net.two = nn.Linear(4, 2)
            self.add_param_group({"params": list(self.net.two.parameters())})
        layers = [self.net.one] + ([self.net.two] if self.calls >= 3 else [])
        return sum(layer(x).square().sum() for layer in layers)


TOLD = (
    "two.weight joined the model after the clipper was built (2 in all); call "
    "clipper.rebuild() "
    "on all ranks"
)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
def test_under_accelerate():
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    from distclip.integrations.accelerate import prepare

    net = nn.Module()
    net.one = nn.Linear(4, 2)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1))
    clipper, loss = prepare(accelerator, model, max_norm=0.1), Grows(net, optimizer.add_param_group)

    def step():
        optimizer.zero_grad()
        accelerator.backward(loss(torch.ones(3, 4)))
        want = norm(net)
        assert (
            accelerator.clip_grad_norm_(model.parameters(), 0.1).item()
            == pytest.approx(want, rel=1e-6)
            and want > 0.1
        )
        optimizer.step()

    step()
    step()
    for _ in range(2):
        with pytest.raises(distclip.GradientError, match=re.escape(TOLD)):
            step()
    clipper.rebuild()
    step()


@pytest.mark.usefixtures("of_frameworks")
@pytest.mark.filterwarnings("ignore")
def test_under_lightning():
    pytest.importorskip("lightning")
    from lightning.pytorch import LightningModule, Trainer

    from distclip.integrations.lightning import GradientClipping

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 2)

        def on_train_start(self):
            self.__dict__["loss"] = Grows(self, self.optimizers().add_param_group)

        def training_step(self, batch, index):
            return self.loss(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[GradientClipping(max_norm=0.1)], **quiet
    )
    with pytest.raises(distclip.GradientError, match="^step 3: rank 0: " + re.escape(TOLD)):
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(5, 4)))
