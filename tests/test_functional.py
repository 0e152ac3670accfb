"""The drop-ins: torch's behaviour on plain tensors, right in low precision, and the global norm on
DTensors."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distclip
from distclip.testing import count_collectives, fully_shard
from parity.layouts import given, mesh
from parity.oracle import NORMS, total_norm

OURS, TORCHS = distclip, torch.nn.utils
INF = math.inf


def params(*shapes, dtype=torch.float32, seed=0, size=1.0):
    source, out = torch.Generator().manual_seed(seed), []
    for shape in shapes:
        p = nn.Parameter(torch.zeros(shape, dtype=dtype))
        p.grad = (torch.randn(shape, generator=source) * size).to(dtype)
        out.append(p)
    return out


def grads(ps):
    return [p.grad.to_dense().clone() for p in ps if p.grad is not None]


# Plain tensors


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9])
def test_as_torch_on_plain_tensors(p, max_norm, foreach):
    ours, torchs = params((5, 3), (7,), ()), params((5, 3), (7,), ())
    unused = nn.Parameter(torch.zeros(2))
    with count_collectives() as seen:
        norm = OURS.clip_grad_norm_([*ours, unused], max_norm, p, foreach=foreach)
    want = TORCHS.clip_grad_norm_([*torchs, unused], max_norm, p, foreach=foreach)
    torch.testing.assert_close(norm, want)
    torch.testing.assert_close(grads(ours), grads(torchs))
    assert seen.names == [] and unused.grad is None and norm.dtype == torch.float32


@pytest.mark.parametrize("p", [0, -1.0, -2, 1.5, 20.0, "inf"])
def test_orders_that_only_torch_knows(p):
    """Any order that torch's norm takes, as a number or as text."""
    ours, torchs = params((5, 3), (7,)), params((5, 3), (7,))
    torch.testing.assert_close(
        OURS.clip_grad_norm_(ours, 0.5, p), TORCHS.clip_grad_norm_(torchs, 0.5, p)
    )
    torch.testing.assert_close(grads(ours), grads(torchs))


@pytest.mark.parametrize("p", [9, 30.0, INF, "inf"])
@pytest.mark.parametrize("size", [1e-3, 1.0])  # torch's powers of small numbers vanish in float32
def test_high_orders(p, size):
    ps = params((5, 3), (7,), size=size)
    want = total_norm(grads(ps), float(p))
    assert OURS.clip_grad_norm_(ps, want / 2, p).item() == pytest.approx(want, rel=1e-6)
    assert total_norm(grads(ps), float(p)) == pytest.approx(want / 2 / (1 + 1e-6 / want), rel=1e-6)


@pytest.mark.parametrize("p", [0, -1.0, -INF, "-inf", math.nan])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_orders_beyond_those_of_the_clipper_on_plain_tensors(p, size):
    ours, torchs = params((5, 3), (7,), size=size), params((5, 3), (7,), size=size)
    torch.testing.assert_close(
        OURS.get_total_norm(grads(ours), p), TORCHS.get_total_norm(grads(torchs), p), equal_nan=True
    )
    OURS.clip_grad_norm_(ours, size / 2, p)
    TORCHS.clip_grad_norm_(torchs, size / 2, p)
    torch.testing.assert_close(grads(ours), grads(torchs), equal_nan=True)


@pytest.mark.parametrize("how", [lambda ps: ps[0], lambda ps: (p for p in ps), tuple, list])
def test_what_may_be_passed(how):
    ours, torchs = params((5, 3)), params((5, 3))
    torch.testing.assert_close(
        OURS.clip_grad_norm_(how(ours), 0.5), TORCHS.clip_grad_norm_(how(torchs), 0.5)
    )
    OURS.clip_grad_value_(how(ours), 0.01)
    TORCHS.clip_grad_value_(how(torchs), 0.01)
    torch.testing.assert_close(grads(ours), grads(torchs))
    norm = OURS.get_total_norm(how([p.grad for p in ours]), 1.0)
    torch.testing.assert_close(norm, TORCHS.get_total_norm([p.grad for p in torchs], 1.0))
    OURS.clip_grads_with_norm_(how(ours), 0.1, norm)
    TORCHS.clip_grads_with_norm_(how(torchs), 0.1, norm)
    torch.testing.assert_close(grads(ours), grads(torchs))


def test_nothing_to_clip():
    assert (
        OURS.clip_grad_norm_([], 1.0) == 0
        and OURS.clip_grad_norm_([nn.Parameter(torch.ones(2))], 1.0) == 0
    )
    assert OURS.get_total_norm([]) == 0
    OURS.clip_grad_value_([nn.Parameter(torch.ones(2))], 1.0)
    said = []
    for functions in (OURS, TORCHS):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            functions.clip_grad_norm_((p for p in []), 1.0)
            # of other iterables torch says nothing
            functions.clip_grad_norm_(filter(None, []), 1.0)
        said.append([str(w.message) for w in caught])
    assert said[0] == said[1] and len(said[0]) == 1


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_error_if_nonfinite_in_torchs_words(bad):
    texts = []
    for functions in (OURS, TORCHS):
        ps = params((3,))
        ps[0].grad[1] = bad
        before = grads(ps)
        with pytest.raises(RuntimeError) as error:
            functions.clip_grad_norm_(ps, 1.0, error_if_nonfinite=True)
        texts.append(str(error.value))
        torch.testing.assert_close(grads(ps), before, equal_nan=True)
        assert not functions.clip_grad_norm_(ps, 1.0).isfinite()
    assert texts[0] == texts[1]


def test_float64_overflows_where_torchs_does():
    for functions in (OURS, TORCHS):
        p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        p.grad = torch.full((2,), 2e200, dtype=torch.float64)
        assert functions.get_total_norm([p.grad]).isinf()
        with pytest.raises(RuntimeError, match="non-finite"):
            functions.clip_grad_norm_([p], 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_what_is_no_threshold(max_norm):
    for call in (
        lambda ps: OURS.clip_grad_norm_(ps, max_norm),
        lambda ps: OURS.clip_grad_value_(ps, max_norm),
    ):
        ps = params((3,))
        before = grads(ps)
        with pytest.raises(ValueError, match=r"is not a (threshold|bound)"):
            call(ps)
        assert torch.equal(grads(ps)[0], before[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 2e3])
def test_low_precision_is_measured_in_float32(dtype, size):
    """torch rounds each tensor's norm to its dtype: 65504 overflows, and three digits are all there
    are."""
    ps = params((300, 4), (57,), dtype=dtype, size=size)
    want = total_norm(grads(ps))
    norm = OURS.clip_grad_norm_(ps, 0.5 * want)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(want, rel=1e-6)
    assert total_norm(grads(ps)) == pytest.approx(0.5 * want, rel=2e-3)


@pytest.mark.parametrize("size", [1e20, 1e-25, 1.0])
def test_any_size(size):
    ps = params((1000,), size=size)
    want = total_norm(grads(ps))
    assert OURS.get_total_norm([p.grad for p in ps]).item() == pytest.approx(want, rel=1e-6)


def test_unusual_gradients():
    shared, sparse, turned, cplx, empty = params((4,), (6, 2), (3, 8), (5,), (0,))
    again = nn.Parameter(torch.zeros(4))
    again.grad = shared.grad  # counts and is scaled once
    dense = torch.zeros(6, 2)
    dense[[1, 4]] = torch.tensor([[1.0, 2.0], [6.0, 8.0]])
    sparse.grad = torch.sparse_coo_tensor(
        [[4, 1, 4]], [[3.0, 4.0], [1.0, 2.0], [3.0, 4.0]], (6, 2), check_invariants=True
    )
    turned.grad = turned.grad.t().contiguous().t()
    cplx = nn.Parameter(torch.zeros(5, dtype=torch.complex64))
    cplx.grad = torch.randn(5, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    ps = [shared, again, sparse, turned, cplx, empty]
    before = [g.clone() for g in (shared.grad, dense, turned.grad, cplx.grad)]
    norm = OURS.clip_grad_norm_(ps, 1.0)
    want = math.sqrt(sum(g.abs().double().square().sum().item() for g in before))
    assert norm.item() == pytest.approx(want, rel=1e-6) and want > 1
    after = [shared.grad, sparse.grad.to_dense(), turned.grad, cplx.grad]
    torch.testing.assert_close(after, [g / (want + 1e-6) for g in before])


# DTensors


def shards(strategy):
    """(model, input) with gradients, held by four ranks, and the whole model's gradients."""
    torch.manual_seed(3)
    # FSDP2 warns of an output that is a view
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5), nn.Softplus())
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(4))
    reference = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5), nn.Softplus()).double()
    reference.load_state_dict({k: v.double() for k, v in net.state_dict().items()})
    reference(x.double()).square().sum().backward()
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if strategy == "tp":
        net = parallelize_module(net, mesh(4), plan)
    if strategy == "tp_fsdp2":
        net = parallelize_module(net, mesh(2, 2)["inner"], plan)
        net = fully_shard(net, mesh=mesh(2, 2)["outer"])
    if strategy in ("fsdp2", "hsdp"):
        on = mesh(4) if strategy == "fsdp2" else mesh(2, 2)
        for child in (net[0], net[2]):
            fully_shard(child, mesh=on)
        net = fully_shard(net, mesh=on)
    net(x).square().sum().backward()
    whole = [p.grad.full_tensor().clone() for p in net.parameters()]
    for ours, other in zip(whole, reference.parameters()):
        torch.testing.assert_close(ours.double(), other.grad, rtol=1e-4, atol=1e-4)
    return net, whole


def on_dtensors(strategy, p):
    net, truth = shards(strategy)
    threshold = total_norm(truth, p) / 2
    with CommDebugMode() as seen:
        norm = OURS.clip_grad_norm_(net.parameters(), threshold, p)
    counts = {str(op): n for op, n in seen.get_comm_counts().items()}
    error = max(
        (param.grad.full_tensor() - want * threshold / (2 * threshold + 1e-6)).abs().max().item()
        for param, want in zip(net.parameters(), truth)
    )
    OURS.clip_grad_value_(net.parameters(), 0.01)
    largest = max(param.grad.full_tensor().abs().max().item() for param in net.parameters())
    kind = (
        isinstance(norm, DTensor),
        [isinstance(x, Replicate) for x in norm.placements],
        norm.device_mesh.shape,
    )
    return norm.full_tensor().item(), total_norm(truth, p), counts, error, largest, kind


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("strategy, dims", [("fsdp2", 1), ("tp", 1), ("hsdp", 2), ("tp_fsdp2", 2)])
def test_the_global_norm_on_one_mesh(ranks, strategy, dims, p):
    rows = ranks.run(on_dtensors, strategy, p)
    for norm, want, counts, error, largest, kind in rows:
        assert norm == pytest.approx(want, rel=1e-6) and want > 0
        assert counts == {"c10d_functional.all_reduce": dims}
        assert error < 1e-6 and largest == pytest.approx(0.01)
        assert kind[:2] == (True, [True] * dims)
    assert len({row[0].hex() for row in rows}) == 1


def mixture(p):
    """Two meshes, and a plain tensor that counts once."""
    a = given("a", 8, 3, on=mesh(4), place=[Shard(0)])
    b = given("b", 9, on=mesh(2, 2), place=[Replicate(), Shard(0)])
    c = given("c", 5)
    named = [a, b, c]
    want = total_norm(
        [x.grad.full_tensor() if isinstance(x.grad, DTensor) else x.grad for _, x in named], p
    )
    norm = OURS.clip_grad_norm_([x for _, x in named], want / 2, p)
    after = total_norm(
        [x.grad.full_tensor() if isinstance(x.grad, DTensor) else x.grad for _, x in named], p
    )
    return norm.item(), want, after, isinstance(norm, DTensor)


@pytest.mark.parametrize("p", NORMS)
def test_mixed_meshes_and_plain_tensors(ranks, p):
    for norm, want, after, is_dtensor in ranks.run(mixture, p):
        assert norm == pytest.approx(want, rel=1e-6) and not is_dtensor
        assert after == pytest.approx(want / 2, rel=1e-5)


ODD = [0, 0.0, -1.0, -2, -INF, math.nan, "-inf", "nan"]


def odd_orders(among):
    """What is said, and what became of the gradients, for DTensors alone or with a plain tensor
    beside them."""
    _, a = given("a", 8, 3, on=mesh(4), place=[Shard(0)])
    _, b = given("b", 9, on=mesh(2, 2), place=[Replicate(), Shard(0)])
    _, c = given("c", 5)
    ps = {"one": [a], "two meshes": [a, b], "plain beside": [c, a]}[among]
    before = [
        p.grad.full_tensor().clone() if isinstance(p.grad, DTensor) else p.grad.clone() for p in ps
    ]
    texts = []
    for p in ODD:
        with CommDebugMode() as seen:
            for call, arguments in (
                (OURS.clip_grad_norm_, (ps, 0.5)),
                (OURS.get_total_norm, ([x.grad for x in ps],)),
            ):
                try:
                    texts.append(float(call(*arguments, norm_type=p)))
                except ValueError as error:
                    texts.append(str(error))
        assert seen.get_total_counts() == 0, "nothing is sent"
    after = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in ps]
    return texts, all(map(torch.equal, before, after))


@pytest.mark.parametrize("among", ["one", "two meshes", "plain beside"])
def test_orders_that_are_refused_on_dtensors(ranks, among):
    for texts, untouched in ranks.run(odd_orders, among):
        assert untouched and texts == [
            f"norm_type={float(p)}: on DTensors the order of a norm must be positive, or math.inf; "
            f"others are known on plain tensors "
            "alone (gather these by full_tensor())"
            for p in ODD
            for _ in range(2)
        ]


def high_orders(p, size):
    """Norm and clipped gradients of DTensors with a plain tensor among them, beside torch's of
    whole tensors."""
    ps = [
        given("a", 8, 3, on=mesh(4), place=[Shard(0)])[1],
        given("b", 9, on=mesh(2, 2), place=[Replicate(), Shard(0)])[1],
    ]
    ps += [given("c", 5)[1]]
    for x in ps:
        x.grad = x.grad * size
    plain = [nn.Parameter(torch.zeros(x.shape)) for x in ps]
    for x, y in zip(ps, plain):
        y.grad = (x.grad.full_tensor() if isinstance(x.grad, DTensor) else x.grad).clone()
    rows = [
        float(OURS.clip_grad_norm_(ps, size / 2, p)),
        float(TORCHS.clip_grad_norm_(plain, size / 2, p)),
    ]
    after = [(x.grad.full_tensor() if isinstance(x.grad, DTensor) else x.grad) / size for x in ps]
    return rows, max(float((x - y.grad / size).abs().max()) for x, y in zip(after, plain))


@pytest.mark.parametrize("p, size", [(9, 1.0), (9, 1e-3), (20.0, 1.0), (30.0, 0.1), ("inf", 1e-3)])
def test_high_orders_and_texts_on_dtensors_are_as_on_whole_tensors(ranks, p, size):
    for (ours, torchs), off in ranks.run(high_orders, p, size):
        assert ours == pytest.approx(torchs, rel=1e-5) and ours > size / 2 and off <= 1e-5


def nan_on(rank, p):
    _, x = given("a", 8, on=mesh(4), place=[Shard(0)])
    if dist.get_rank() == rank:
        x.grad.to_local()[0] = math.nan
    try:
        OURS.clip_grad_norm_([x], 1.0, p, error_if_nonfinite=True)
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_nan_on_any_rank_is_an_error_on_all(ranks, p):
    for rank in range(4):
        texts = ranks.run(nan_on, rank, p)
        assert len(set(texts)) == 1 and "non-finite" in texts[0]


def refused():
    net = FSDP1(nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=True)
    net(torch.ones(1, 4)).sum().backward()
    texts = []
    partial = nn.Parameter(
        distribute_tensor(torch.zeros(4), mesh(4), [Replicate()], src_data_rank=None)
    )
    partial.grad = DTensor.from_local(torch.ones(4), mesh(4), [Partial()], run_check=False)
    for ps in (list(net.parameters()), [partial]):
        try:
            OURS.clip_grad_norm_(ps, 1.0)
        except ValueError as error:
            texts.append(str(error))
    return texts


def test_what_cannot_be_known_is_refused(ranks):
    for texts in ranks.run(refused):
        assert texts == [
            "parameter 0 is a shard of an FSDP1 module: its norm on this rank is not the global "
            "one. Use distclip.GradClipper(model, "
            "max_norm=...) on the outermost FullyShardedDataParallel module, or its own "
            "clip_grad_norm_",
            "a gradient of shape (4,) has placements (Partial(sum),): Partial sums that are not "
            "reduced yet; before clipping: "
            "p.grad = p.grad.redistribute(placements=p.placements)",
        ]


# In torch's place

CLIP_GRAD = torch.nn.utils.clip_grad
HELD = {
    name: getattr(torch.nn.utils, name)
    for name in ("clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_")
}
PLACES = [(torch.nn.utils, name, name) for name in HELD]
PLACES += [(CLIP_GRAD, name, name) for name in ("clip_grad_norm_", "clip_grad_value_")]
# torch's clip_grad_norm_ calls the other two by these names
PLACES += [
    (CLIP_GRAD, f"_{name}", name)
    for name in ("get_total_norm", "clip_grads_with_norm_")
    if hasattr(CLIP_GRAD, f"_{name}")
]


@pytest.fixture(
    params=[*range(len(PLACES)), "all"], ids=[*(f"{m.__name__}.{n}" for m, n, _ in PLACES), "all"]
)
def in_torchs_place(request, monkeypatch):
    for module, name, ours in PLACES if request.param == "all" else [PLACES[request.param]]:
        monkeypatch.setattr(module, name, getattr(distclip, ours))


def on_meta(*shapes):
    ps = [nn.Parameter(torch.zeros(shape, device="meta")) for shape in shapes]
    for p in ps:
        p.grad = torch.zeros_like(p)
    return ps


def nonfinite(functions):
    ps = params((3,))
    ps[0].grad[1] = math.nan
    functions["clip_grad_norm_"](ps, 1.0, error_if_nonfinite=True)


WAYS = {
    "empty generator": lambda f: f["clip_grad_norm_"]((p for p in []), 1.0),
    "empty filter": lambda f: f["clip_grad_norm_"](filter(None, []), 1.0),
    "empty list": lambda f: f["clip_grad_norm_"]([], 1.0),
    "no gradients": lambda f: f["clip_grad_norm_"]([nn.Parameter(torch.zeros(2))], 1.0),
    "plain": lambda f: [f["clip_grad_norm_"](ps := params((5,), (2, 2)), 0.5), *grads(ps)],
    "order 0": lambda f: [f["clip_grad_norm_"](ps := params((5,), (2, 2)), 0.5, 0.0), *grads(ps)],
    "order -inf": lambda f: f["get_total_norm"](grads(params((5,), (2, 2))), -INF),
    "meta": lambda f: f["clip_grad_norm_"](on_meta((5,), (2, 2)), 0.5).device,
    "meta, each": lambda f: f["clip_grad_norm_"](on_meta((5,)), 0.5, foreach=False).device,
    "meta, norm": lambda f: f["get_total_norm"]([p.grad for p in on_meta((5,))]).device,
    "meta, value": lambda f: f["clip_grad_value_"](on_meta((5,), (2, 2)), 0.5),
    "meta, scale": lambda f: f["clip_grads_with_norm_"](
        on_meta((5,)), 0.5, torch.ones((), device="meta")
    ),
    "value": lambda f: [f["clip_grad_value_"](ps := params((5,), (2, 2)), 0.5), *grads(ps)],
    "not finite": nonfinite,
    "not finite, order -1": lambda f: f["get_total_norm"](
        [torch.tensor([math.nan, 1.0])], -1.0, True
    ),
}


def outcome(way, functions):
    """What a way ends in: the values, or the error's words, and what is warned of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            values = way(functions)
        except Exception as error:
            values = f"{type(error).__name__}: {error}"
    return values, [str(warning.message) for warning in said]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_in_torchs_place_they_never_come_back_to_themselves(in_torchs_place, way):
    """By torch's names, and by torch's own functions, which find distclip's under those names."""
    looked_up = {name: getattr(torch.nn.utils, name) for name in HELD}
    for functions in (looked_up, HELD):
        seen, told = outcome(way, functions)
        with pytest.MonkeyPatch.context() as back:
            for module, name, ours in PLACES:
                back.setattr(module, name, HELD[ours])
            want, said = outcome(way, HELD)
        assert told == said and "Recursion" not in str(seen)
        if isinstance(want, (str, torch.device, type(None))):
            assert seen == want
        else:
            torch.testing.assert_close(seen, want)


def test_put_back_all_is_as_before():
    assert all(getattr(module, name) is HELD[ours] for module, name, ours in PLACES)
