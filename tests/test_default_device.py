"""A default device, set by `torch.device(...)` as a context or for good, is for the user's tensors:
distclip's lie where it computes.

"meta" stands for any device that is not the gradients': whatever is made there holds no numbers, so
that nothing can pass by luck.
"""

import math
from array import array
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import distclip
import skips
from distclip.decide.audit import fingerprint_of, gather_culprits
from distclip.exchange.channel import Channel
from distclip.exchange.readback import Readback
from distclip.kernels import triton_lists
from distclip.records import ParamHolding, ParamPiece
from distclip.setup.plan import agree_on_call, make_plan
from distclip.testing import run_threads
from kernels.native_cases import NO_LIBRARY
from policies.cases import CASES, decaying
from policies.test_trace import GROUPS, at

INF, CPU = math.inf, torch.device("cpu")
# small, middling and large for torch's operations; a scalar; nothing
SHAPES = ((5, 3), (2000,), (1100, 1000), (), (0,))
FEW = ((5, 3), (2000,), (), (0,))
POLICIES = {
    "FixedNorm": lambda: distclip.FixedNorm(1.0),
    "FixedValue": lambda: distclip.FixedValue(2.0),
    "Normalize": lambda: distclip.Normalize(1.0),
    "Scheduled": lambda: distclip.Scheduled([(0, 2.0), (2, 0.5)]),
    "Scheduled by a function": lambda: distclip.Scheduled(decaying),
    "AutoClip": lambda: distclip.AutoClip(50),
    "ZClip": lambda: distclip.ZClip(warmup=2),
    "AdaGC": lambda: distclip.AdaGC(warmup=1),
    "AGC": lambda: distclip.AGC(0.01),
    "Warmup": lambda: distclip.Warmup(distclip.AutoClip(50), 1, 1.0),
    "SkipSpikes": lambda: distclip.SkipSpikes(distclip.ZClip(warmup=2), warmup=2),
    "Escalate": lambda: distclip.Escalate(distclip.ZClip(warmup=2), warmup=2),
}


@contextmanager
def set_for_good():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)
        # torch 2.8 leaves a None there, on which its own get_default_device fails
        vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)


UNDER = {"context": lambda: torch.device("meta"), "set_default_device": set_for_good}
under = pytest.mark.parametrize("elsewhere", UNDER.values(), ids=UNDER)


@pytest.fixture(
    params=[
        pytest.param(
            "native",
            marks=pytest.mark.skipif(NO_LIBRARY, reason="the native kernels are not compiled here"),
        ),
        "torch",
    ]
)
def kernels(request, monkeypatch):
    monkeypatch.setenv("DISTCLIP_KERNELS", request.param)


def params(dtype=torch.float32, shapes=SHAPES):
    out = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    draw(out, 0)
    return out


def draw(ps, seed):
    source = torch.Generator().manual_seed(seed)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=source).to(p.dtype)


def same(a, b):
    """Bit for bit, of as many tensors, all with numbers."""
    assert len(a) == len(b) > 0 and all(t.device == CPU for t in (*a, *b))
    return all(
        x.dtype == y.dtype and torch.equal(x.nan_to_num(-1), y.nan_to_num(-1))
        for x, y in zip(a, b, strict=True)
    )


@under
def test_the_default_device_counts(elsewhere):
    with elsewhere():
        assert (
            torch.zeros(1).device.type
            == torch.tensor(1).device.type
            == torch.as_tensor(torch.ones(1, device="cpu")).device.type
            == "meta"
        )
    assert torch.zeros(1).device == CPU


# Drop-ins


@under
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [2.0, 1.0, 2.5, INF])
def test_drop_ins(kernels, elsewhere, p, dtype):
    def results(where):
        first, second = params(dtype), params(dtype)
        with where():
            norms = [
                distclip.clip_grad_norm_(first, 1.0, p),
                distclip.get_total_norm([q.grad for q in second], p),
            ]
            distclip.clip_grads_with_norm_(second, 1.0, norms[1])
            distclip.clip_grad_value_(second, 1e-4)
        return [*norms, *(q.grad for q in (*first, *second))]

    got, want = results(elsewhere), results(nullcontext)
    assert same(got, want) and want[0] > 1


def sharded_norms():
    def results(where):
        mesh = init_device_mesh("cpu", (4,))
        p = nn.Parameter(distribute_tensor(torch.ones(10, 3), mesh, [Shard(0)]))
        p.grad = distribute_tensor(torch.arange(30.0).reshape(10, 3), mesh, [Shard(0)])
        with where():
            norms = [distclip.clip_grad_norm_([p], 1.0, order) for order in (2.0, INF)]
        return [*(norm.full_tensor() for norm in norms), p.grad.full_tensor()]

    got, want = results(UNDER["context"]), results(nullcontext)
    return same(got, want) and float(want[0]) > 50


def test_drop_ins_on_shards(ranks):
    assert ranks.run(sharded_norms) == [True] * 4


# Set-up


def agreed(group, elsewhere):
    """The mode of a default device is the thread's own."""
    channel = Channel(group, range(group.size()), group.rank())
    part, whole = (
        ParamHolding("Shard(0)", f"{channel.rank}/{channel.size}", ("mesh",)),
        ParamHolding("whole", "whole", ("all",)),
    )
    pieces = [
        ParamPiece("w", "w", part, (4, 3), 12, (1, 3), None),
        ParamPiece("b", "b", whole, (5,), 5, (5,), None),
    ]
    pieces.append(
        ParamPiece(f"own{channel.rank}", f"own{channel.rank}", whole, (2,), 2, (2,), None)
    )
    with elsewhere():
        agree_on_call(channel, {"a": "1"}, None, CPU)
        plan = make_plan(channel, pieces, [piece.name for piece in pieces], {"w": 1}, 2.0, CPU)
        said = channel.gather_texts("a" * channel.rank, CPU, "a test's texts")
        culprits = gather_culprits(channel, plan, [1.0, math.nan, 2.0], [1.0] * 3, CPU)
        prints = fingerprint_of(torch.arange(6.0, device="cpu"))
    return plan.shares, plan.groups, plan.rows, plan.slot_of, said, culprits, prints


def test_set_up_on_four_ranks():
    got, want = run_threads(4, agreed, UNDER["context"]), run_threads(4, agreed, nullcontext)
    assert (
        got == want
        and [share.num_replicas for share in want[0][0]] == [1, 4, 1]
        and want[0][4] == ["", "a", "aa", "aaa"]
    )


def wrong_set_up(group):
    channel = Channel(group, range(group.size()), group.rank())
    with torch.device("meta"), pytest.raises(distclip.AgreementError) as caught:
        agree_on_call(channel, {"max_norm": f"{channel.rank // 2}"}, None, CPU)
    return str(caught.value)


def test_refusals_still_name_what_differs():
    assert all(
        "max_norm: '0' on rank 0-1; '1' on rank 2-3" in said
        for said in run_threads(4, wrong_set_up)
    )


# Policies


@under
@pytest.mark.parametrize("name", CASES)
def test_policies_decide(elsewhere, name):
    policy, _ = CASES[name]

    def results(where):
        given = [at(step) for step in range(4)]
        with where():
            state, out = policy.init(GROUPS, CPU), []
            for norms in given:
                answer, state = policy.decide(norms, state)
                out += [answer.coef, answer.threshold]
        return [*out, *state]

    assert same(results(elsewhere), results(nullcontext))


@under
@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_built(elsewhere, name):
    with elsewhere():
        assert repr(POLICIES[name]()) == repr(POLICIES[name]())


def test_the_check_of_a_schedule_takes_any_number():
    with torch.device("meta"):
        for schedule in (lambda step: 2.0, lambda step: step + 1, lambda step: 3):
            distclip.Scheduled(schedule)
        with pytest.raises(distclip.ConfigError, match=r"schedule\(0\)=-1"):
            distclip.Scheduled(lambda step: -1.0)


# Stages


@under
def test_host_copies(elsewhere):
    mirror, vector = Readback(), torch.tensor([1.0, 2.0])
    with elsewhere():
        mirror.enqueue(vector, "step 1")
        late = mirror.dequeue()
    assert late == ([1.0, 2.0], "step 1") and Readback.read_now(vector) == [1.0, 2.0]


@pytest.mark.skipif(not triton_lists.has_triton(), reason="triton is not installed")
def test_the_tables_of_the_gpu_kernels(elsewhere=UNDER["context"]):
    dtypes = (torch.float32, torch.bfloat16)
    with elsewhere():
        layout = triton_lists.KernelPlan((5, 40000), dtypes, CPU)
        there = layout._device_addresses(array("Q", [3, 4]))
        reserve = triton_lists._PinnedReserve()
    assert [t.tolist() for t in layout._tables] == [
        [0, 1, 1],
        [0, 1, 3],
        [5, 40000],
        [triton_lists.CODES[d] for d in dtypes],
    ]
    assert there.tolist() == [3, 4] and reserve._free.device == CPU


# The clipper


def steps(make, where, built_inside, **options):
    ps = params(shapes=FEW)
    named = [(f"p{i}", p) for i, p in enumerate(ps)]
    with where() if built_inside else nullcontext():
        clipper = distclip.GradClipper(named, policy=make(), **options)
    out = []
    for seed in range(4):
        draw(ps, seed)
        with where():
            report = clipper.measure() if seed == 3 else clipper.clip_()
            told = report.to_dict()
        out += [
            report.total_norm,
            report.norm_after,
            report.coefs,
            report.threshold,
            report.group_norms,
            *(p.grad for p in ps),
        ]
        out.append(torch.tensor(told["total_norm"]))
    with where():
        saved = clipper.state_dict()
        clipper.load_state_dict(saved)
        clipper.audit()
    return out + [t for t in saved.values() if isinstance(t, torch.Tensor)]


@under
@pytest.mark.parametrize("built_inside", [False, True], ids=["built outside", "built inside"])
@pytest.mark.parametrize("name", POLICIES)
def test_clippers(kernels, elsewhere, name, built_inside):
    got, want = (
        steps(POLICIES[name], elsewhere, built_inside),
        steps(POLICIES[name], nullcontext, False),
    )
    assert same(got, want) and want[0] > 1


@under
@pytest.mark.parametrize("p", [1.0, INF])
def test_clippers_of_other_orders_and_groups(kernels, elsewhere, p):
    options = {"norm_type": p, "groups": distclip.per_parameter(), "on_nonfinite": "propagate"}
    assert same(
        steps(POLICIES["FixedNorm"], elsewhere, True, **options),
        steps(POLICIES["FixedNorm"], nullcontext, False, **options),
    )


@under
@pytest.mark.parametrize("fold", ["auto", "never"])
@skips.told()
def test_steps_of_an_optimizer(kernels, elsewhere, fold):
    def results(where):
        ps = params(shapes=FEW)
        optimizer = torch.optim.AdamW(ps, lr=0.1, fused=True)
        for group in optimizer.param_groups:  # the optimizer's own counters are the user's affair
            optimizer.state.update(
                {
                    p: dict(
                        step=torch.zeros(()),
                        exp_avg=torch.zeros_like(p),
                        exp_avg_sq=torch.zeros_like(p),
                    )
                    for p in group["params"]
                }
            )
        with where():
            clipper = distclip.GradClipper(
                [(f"p{i}", p) for i, p in enumerate(ps)], max_norm=1.0, fold=fold
            )
            report = clipper.step(optimizer)
            bad = [p.grad.fill_(math.nan) for p in ps if p.grad is not None]
            skipped = clipper.step(optimizer)
        assert bad and bool(skipped.skipped)
        return [report.total_norm, report.coefs, *(p.detach() for p in ps)]

    assert same(results(elsewhere), results(nullcontext))


def clips_on_ranks(_):
    def results(where):
        ps = params(shapes=FEW)
        with where():
            clipper = distclip.GradClipper([(f"p{i}", p) for i, p in enumerate(ps)], max_norm=1.0)
            report = clipper.clip_()
            clipper.audit()
        return [report.total_norm, *(p.grad for p in ps)]

    return same(results(UNDER["context"]), results(nullcontext))


def test_clippers_on_four_ranks(ranks):
    assert ranks.run(clips_on_ranks, None) == [True] * 4


def one_rank_elsewhere(rank_of):
    ps = params(shapes=FEW)
    with torch.device("meta") if torch.distributed.get_rank() == rank_of else nullcontext():
        clipper = distclip.GradClipper([(f"p{i}", p) for i, p in enumerate(ps)], max_norm=1.0)
        return float(clipper.clip_().total_norm)


def test_one_rank_alone_has_a_default_device(ranks):
    """Which used to fail there before the collective, so that the others waited for it."""
    norms = ranks.run(one_rank_elsewhere, 2)
    assert len(set(norms)) == 1 and norms[0] > 1
