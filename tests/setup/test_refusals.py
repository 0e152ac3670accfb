"""Four ranks: what one of them gets wrong is refused on all, in words that say who, what was seen,
and what to do."""

import re
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.parallel import DistributedDataParallel

import distclip
import skips
from parity.layouts import given, mesh


def refusal(make):
    try:
        make()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def odd(usual, other):
    return other if dist.get_rank() == 3 else usual


def clip(params, max_norm=1.0, **options):
    return distclip.GradClipper(params, max_norm, **options).clip_()


def other_threshold():
    clip([given("w", 4)], odd(1.0, 2.0))


def a_bad_threshold_on_one_rank():
    clip([given("w", 4)], odd(1.0, -1.0))


def other_shape():
    clip([given("w", odd(4, 5))])


def other_policy_and_groups():
    clip(
        [given("w", 4)],
        odd(1.0, None),
        policy=odd(None, distclip.Normalize(1.0)),
        groups=odd(None, distclip.per_parameter()),
    )


def replica_differs():
    name, p = given("layer.weight", 40)
    p.grad[7] += odd(0, 1)
    clip([given("w", 4), (name, p)])


def two_pairs_of_equal_replicas():
    """Errors that a pairing of +1 and -1 would cancel."""
    name, p = given("layer.weight", 40)
    if dist.get_rank() > 1:
        p.grad *= 2
    clip([(name, p)])


def gradients_on_half_of_the_ranks():
    """Two parameters, each missing on half: the shares add up to a whole number, and it is seen all
    the same."""
    params = [given("a", 4), given("b", 4)]
    if dist.get_rank() > 1:
        for _, p in params:
            p.grad = None
    clip([*params, ("c", given("c", 400)[1])])


def partial_gradient():
    name, p = given("norm", 4, on=mesh(4), place=[Replicate()])
    p.grad = DTensor.from_local(p.grad.to_local(), mesh(4), [Partial()])
    clip([(name, p)])


def unreduced_ddp():
    model = DistributedDataParallel(nn.Linear(3, 3))
    with model.no_sync():
        model(torch.full((1, 3), 1.0 + dist.get_rank())).sum().backward()
    clip(model)


def inside_of_fsdp1():
    model = FullyShardedDataParallel(
        nn.Linear(3, 3), device_id=torch.device("cpu"), use_orig_params=True
    )
    clip(model.module)


def unsharded_fsdp1():
    model = FullyShardedDataParallel(
        nn.Linear(3, 3), device_id=torch.device("cpu"), use_orig_params=True
    )
    with model.no_sync():
        model(torch.ones(1, 3)).sum().backward()
    clip(model)


def replaced():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    clipper = distclip.GradClipper(model, 1.0)
    model[1] = odd(model[1], nn.Linear(2, 2))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    clipper.clip_()


def positions_as_names():
    clip([given("w", 4)[1]])


def no_match():
    clip([given("w", 4)], replicated_over={"nothing.*": distclip.PRIVATE})


def a_group_that_matches_nothing():
    names = ("layers.0.attn.weight", "layers.0.mlp.weight", "layers.1.attn.weight", "head")
    clip([given(name, 4) for name in names], groups=distclip.by_name({"*attention*": 1.0}))


def a_group_where_a_rank_holds_nothing():
    clip(odd([given("w", 4)], []), groups=distclip.by_name({"lost": 1.0}))


def unfrozen_after_ddp():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    wrapped = DistributedDataParallel(model)
    clipper = distclip.GradClipper(wrapped, 1.0)
    model[0].requires_grad_(True)
    wrapped(torch.full((1, 3), 1.0 + dist.get_rank())).sum().backward()
    clipper.clip_()


def reduces_inside_step():
    """Gradients of each rank's own data, which its optimizer would average."""
    name, p = given("w", 4)
    p.grad *= 1 + dist.get_rank()
    distclip.GradClipper([(name, p)], 1.0).step(torch.optim.SGD([p], 0.1))


def one_more_call():
    clipper = distclip.GradClipper([given("w", 4)], 1.0)
    odd(clipper.clip_, clipper.measure)()


def a_rank_that_is_a_call_behind():
    clipper = distclip.GradClipper([given("w", 4)], 1.0)
    clipper._state.step += odd(0, 1)
    clipper.clip_()


REFUSED = {
    other_threshold: r"AgreementError: ranks built different .*policy: "
    r".*FixedNorm\(max_norm=1.0\).* on rank 0-2; .*2.0.* on rank 3",
    a_bad_threshold_on_one_rank: (
        r"(ConfigError: max_norm=-1.0 is not a threshold|AgreementError: another rank.*rank 3: "
        r"ConfigError: max_norm=-1.0)"
    ),
    other_shape: (
        r"AgreementError: rank 0-2: w has shape \(4,\)\nrank 3: w has shape \(5,\)\nIf these are "
        r"different parameters under one name "
        r"\(pipeline stages, experts\), declare replicated_over=\{pattern: process group \| "
        r"distclip.PRIVATE\}. If they should be equal, "
        r"build the same model on all ranks$"
    ),
    other_policy_and_groups: r"AgreementError: ranks built different.*groups: .*policy: .*Normalize",
    replica_differs: r"AgreementError: step 1: .*\nlayer.weight: norm \S+ on rank 0-2, norm \S+ on "
    r"rank 3\n.*replicated_over",
    two_pairs_of_equal_replicas: r"layer.weight: norm \S+ on rank 0-1, norm \S+ on rank 2-3",
    gradients_on_half_of_the_ranks: r"a: norm \S+ on rank 0-1, no gradient on rank 2-3\nb: ",
    partial_gradient: (
        r"GradientError: step 1: rank 0-3: the gradient of norm has placements "
        r".*Partial.*redistribute\(placements=p.placements\)"
    ),
    unreduced_ddp: r"AgreementError: .*no_sync",
    inside_of_fsdp1: r"PlacementError: .*pass the outermost FullyShardedDataParallel module",
    unsharded_fsdp1: r"GradientError: .*(local shape|no gradient|not sharded)",
    replaced: r"GradientError: step 1: rank 3: 1\S* was replaced after the clipper was "
    r"built.*clipper.rebuild\(\) on all ranks",
    positions_as_names: r"ConfigError: bare parameters have no names.*model.named_parameters\(\)",
    no_match: r"ConfigError: 'nothing.\*' matches no parameter on any rank; the nearest names on "
    r"this rank: w \(1 in all\)$",
    a_group_that_matches_nothing: (
        r"ConfigError: '\*attention\*' matches no parameter on any rank; the nearest names on this "
        r"rank: layers.0.attn.weight, "
        r"layers.1.attn.weight, layers.0.mlp.weight \(4 in all\)$"
    ),
    a_group_where_a_rank_holds_nothing: r"ConfigError: 'lost' matches no parameter on any rank; "
    r"(the nearest names|this rank holds no par)",
    unfrozen_after_ddp: r"AgreementError: step 1: .*unfrozen after DistributedDataParallel was "
    r"built are not reduced by it: wrap the model",
    reduces_inside_step: r"AgreementError: step 1: .*An optimizer that reduces gradients inside "
    r"its step\(\) comes too late: reduce them",
    one_more_call: r"AgreementError: ranks did not do the same.*\nrank 0-2: at step 1: "
    r"clip_.*\nrank 3: at step 1: measure",
    a_rank_that_is_a_call_behind: r"rank 0-2: at step 1: .*\nrank 3: at step 2: ",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda f: f.__name__)
def test_refused_on_every_rank(ranks, make):
    for text in ranks.run(refusal, make):
        assert text is not None and re.search(REFUSED[make], text, re.DOTALL), text


def rounding_apart():
    name, p = given("w", 400)
    p.grad *= 1 + 1e-7 * dist.get_rank()
    return refusal(distclip.GradClipper([(name, p)], 1e9).clip_)


def test_rounding_is_no_drift(ranks):
    assert ranks.run(rounding_apart) == [None] * 4


def negated_copy():
    """Equal norms, other gradients: only the audit can tell."""
    name, p = given("w", 40)
    clipper = distclip.GradClipper([(name, p)], 1e9)
    p.grad *= odd(1, -1)
    clipper.clip_()
    return refusal(clipper.audit)


def test_the_audit_sees_what_norms_cannot(ranks):
    for text in ranks.run(negated_copy):
        assert text is not None and "w: norm" in text


NAN, INF = float("nan"), float("inf")
POISON = {  # on the first three ranks and on the last, and what the audit says; element 5 of "w"
    "the same": (NAN, NAN, None),
    "infinite alike": (INF, INF, None),
    "large alike": (1e200, 1e200, None),
    "on one rank": (1.0, NAN, r"w: norm \S+ on rank 0-2, norm \S+ beside inf or NaN on rank 3\n"),
    "of other kinds": (
        NAN,
        -INF,
        r"w: norm \S+ beside inf or NaN with signed sum \S+ and \S+ of inf and NaN on rank 0-2, ",
    ),
    "of other signs": (INF, -INF, r"of inf and NaN on rank 0-2, norm .* of inf and NaN on rank 3"),
    "besides one that differs": (NAN, (NAN, 7.0), r"w: norm .* on rank 0-2, norm .* on rank 3\n"),
    "elsewhere": (NAN, (1.0, NAN), r"w: norm .* on rank 0-2, norm .* on rank 3\n"),
}


def audited(usual, other):
    """By the audit, of a copy; beside it each rank has a NaN of its own, which nobody shares."""
    name, p = given("w", 40, dtype=torch.float64)
    own = given(f"own{dist.get_rank()}", 4)
    own[1].grad[1] = NAN
    values = torch.tensor(odd(usual, other), dtype=torch.float64).reshape(-1)
    p.grad[5 : 5 + len(values)] = values
    return refusal(distclip.GradClipper([(name, p), own], 1.0).audit)


@pytest.mark.parametrize("what", POISON)
def test_the_audit_compares_what_is_not_finite(ranks, what):
    usual, other, said = POISON[what]
    for text in ranks.run(audited, usual, other):
        if said is None:
            assert text is None
        else:
            assert text is not None and re.search(said, text), text
            assert text.startswith("AgreementError: step 1: gradients that should be copies")
            assert "own" not in text.partition("\nIf")[0]


def test_the_audit_alone_has_nothing_to_compare():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([NAN, INF])
    assert refusal(distclip.GradClipper([("w", p)], 1.0).audit) is None


def poisoned(mode):
    name, p = given("layer.weight", 4)
    q = given(f"own{dist.get_rank()}", 4)
    q[1].grad[1] *= odd(1.0, float("nan"))
    clipper = distclip.GradClipper([(name, p), q], 1.0, on_nonfinite=mode)
    with skips.told() if mode == "skip" else nullcontext():
        text = refusal(clipper.clip_)
    return text, p.grad is None, p.grad is not None and bool(p.grad.isfinite().all())


def test_a_nan_on_one_rank_is_seen_by_all(ranks):
    for text, dropped, _ in ranks.run(poisoned, "skip"):
        assert text is None and dropped
    for text, dropped, kept in ranks.run(poisoned, "propagate"):
        assert text is None and not dropped and kept
    for text, dropped, kept in ranks.run(poisoned, "raise"):
        assert text is not None and "own3 on rank 3: NaN" in text and not dropped and kept
