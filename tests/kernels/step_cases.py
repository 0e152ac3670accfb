"""What `test_step_kernels` runs in processes of its own: a step's numbers by the kernels under
triton's interpreter, beside torch's operations. As these stand in `exchange/` and `decide/`, they
are the oracle: what the kernels give must be the same bits, but for sums of several numbers."""

import copy
import math
import random
from datetime import timedelta
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

import distclip
import interpreted
from distclip import kernels
from distclip.decide import state
from distclip.decide.decision import decide, resolve
from distclip.decide.fixed_on_device import fixed_on_device, status_of
from distclip.decide.global_norms import read_norms
from distclip.decide.guard import is_fine
from distclip.exchange import message
from distclip.exchange.message import CHECK_WORDS, MessageLayout
from distclip.exchange.readback import NOTHING_KNOWN, fill_in, pack_numbers
from distclip.groups import Exempt
from distclip.policies.assignment import assign_policies
from late import judged_late

CPU = torch.device("cpu")
TOLERANCE = 1e-5


def bits(tensor):
    """Its numbers, so that NaNs of the same bits are equal, and -0 is not 0."""
    kinds = {1: torch.uint8, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.dtype.itemsize]).tolist()


def layout_of(dice, norm_type, groups, layers=0, stats=0, ranks=1, rank_norms=False):
    draw = torch.Generator().manual_seed(dice.randrange(1 << 30))
    pieces = groups * 2 + dice.choice([0, 90, 3000])
    parts = pieces + dice.randrange(40) if layers else 0

    def shares(count):
        return 1.0 / torch.randint(1, 5, (count,), generator=draw).double()

    def owners(owned, count):  # not each owns something
        return torch.randint(0, max(owned, 1), (count,), generator=draw)

    return MessageLayout(
        norm_type=norm_type,
        num_groups=groups,
        num_layers=layers,
        num_stats=stats,
        num_ranks=ranks,
        share=shares(pieces),
        drift_weight=shares(pieces) * torch.randint(-1, 2, (pieces,), generator=draw),
        group_of=owners(groups, pieces),
        layer_of=owners(layers, parts),
        layer_share=shares(parts),
        on_host=False,
        num_rank_norms=ranks if rank_norms else 0,
    )


def without_kernels(layout):
    """The same layout, of torch's operations."""
    other = object.__new__(MessageLayout)
    for name in MessageLayout.__slots__:
        object.__setattr__(other, name, getattr(layout, name))
    object.__setattr__(other, "_packer", None)
    return other


def messages():
    """(which words may differ in their last bits, relative difference there, other words equal?)
    of messages of all kinds."""
    interpreted.begin()
    out = []
    for seed in range(16):
        dice = random.Random(seed)
        norm_type = dice.choice([2.0, math.inf, 1.0, 3.0])
        layout = layout_of(
            dice,
            norm_type,
            groups=dice.choice([1, 1, 3, 150]),
            layers=dice.choice([0, 0, 5]),
            stats=dice.choice([0, 2, 130, 1100]),
            ranks=dice.choice([1, 4]),
            rank_norms=dice.random() < 0.5,
        )
        draw = torch.Generator().manual_seed(seed)
        pieces, parts = len(layout.share), len(layout.layer_share)
        sums = torch.randn(pieces, generator=draw, dtype=torch.float64).square()
        for _ in range(dice.choice([0, 0, 1, 3])):
            sums[dice.randrange(pieces)] = dice.choice([math.inf, math.nan])
        scaled = dice.random() < 0.5
        inv_scale = torch.tensor(1 / dice.randint(1, 1 << 20), dtype=torch.float64)
        found = dice.choice([None, torch.tensor(1.0), torch.tensor(math.nan), 2.0])
        args = dict(
            power_sums=sums,
            stats=torch.rand(layout.num_stats, generator=draw, dtype=torch.float64)
            if layout.num_stats
            else None,
            presence=layout.presence_words((torch.rand(pieces, generator=draw) < 0.9).double()),
            found_inf=found,
            has_error=dice.random() < 0.5,
            has_notes=dice.random() < 0.5,
            tokens=[
                float(dice.randrange(1 << 16)),
                float(dice.randrange(1 << 16)),
                dice.choice([torch.tensor(65535.0, dtype=torch.float64), 7]),
            ],
            inv_scale=inv_scale if scaled else None,
            part_sums=torch.rand(parts, generator=draw, dtype=torch.float64) if parts else None,
            rank_norms=torch.rand(4, generator=draw, dtype=torch.float64)[: layout.num_ranks]
            if layout.num_rank_norms
            else None,
        )
        assert layout._packer is not None
        got, want = layout.pack(**args), without_kernels(layout).pack(**args)
        sums_end = layout.layers.stop
        drift = [] if layout.norm.is_max else [layout.checks.start]
        added = torch.zeros(len(want), dtype=torch.bool)
        added[:sums_end], added[drift] = True, True
        scale = sums.nan_to_num(posinf=0.0).sum()  # a drift may cancel out
        finite = want.isfinite() & added
        off = (got - want).abs()[finite] / torch.maximum(want.abs()[finite], scale)
        same = bits(got[~finite].nan_to_num(7.0)) == bits(want[~finite].nan_to_num(7.0))
        read = torch.tensor(layout.pack(**args, reads=True), dtype=torch.float64)
        same = same and bits(read.nan_to_num(7.0)) == bits(got.nan_to_num(7.0))
        out.append((off.max().item() if finite.any() else 0.0, same, int(finite.sum())))
    return out


def as_tensors(numbers):
    return [torch.as_tensor(number, dtype=torch.float64) for number in numbers]


def drawn_message(dice, layout):
    """A reduced message, of which something may be wrong."""
    draw = torch.Generator().manual_seed(dice.randrange(1 << 30))
    words = torch.zeros(layout.num_words, dtype=torch.float64)
    groups = layout.num_groups
    words[:groups] = torch.randn(groups, generator=draw, dtype=torch.float64).square() * 4
    words[layout.rank_norms] = torch.rand(layout.num_rank_norms, generator=draw).double()
    words[layout.layers] = torch.rand(layout.num_layers, generator=draw).double()
    for place in torch.randint(0, groups, (groups // 4,), generator=draw).tolist():
        # on the threshold, next to it, nothing, next to nothing
        words[place] = dice.choice([1.0, 1.0 + 2e-16, 0.0, 5e-324, 1e300, 1.7e308])
    checks = words[layout.checks]  # a view
    sums = layout.norm.is_max
    checks[-4] = 17.0
    if dice.random() < 0.3:
        bad = dice.choice([math.inf, math.nan])
        words[dice.randrange(groups)], checks[-3] = bad, dice.choice([0.0, 1.0, 2.0])
    elif dice.random() < 0.2:
        checks[-3] = 1.0
    if dice.random() < 0.2:
        checks[-2] = 1.0
    checks[-1] = dice.choice([0.0, 1.0])
    if not sums:
        checks[0] = dice.choice([0.0, 0.0, 1e-7, -1e-7, 1.0]) * float(words[:groups].sum())
        checks[1] = dice.choice([0.0, 0.0, 1e-7, -0.125, math.nan])
    ranks, tokens = layout.num_ranks, torch.tensor([dice.randrange(1 << 16) for _ in range(3)])
    words[layout.tokens] = tokens.double() * (1 if sums else ranks)
    words[layout.beside_tokens] = (-tokens if sums else ranks * tokens * tokens).double()
    if dice.random() < 0.3:
        words[-dice.randrange(1, 7)] += 1
    return words


def decisions():
    """For each kind of message: the names of what differs in any bit; whether it was finite, in
    order, and clipped."""
    interpreted.begin()
    out = []
    for seed in range(150):
        dice = random.Random(seed)
        # no message is packed: compiling a packer is a program for each group here
        with patch.object(message, "kernels_for", lambda dtypes, device: "torch"):
            layout = layout_of(
                dice,
                dice.choice([2.0, 2.0, math.inf, 1.0]),
                groups=dice.choice([1, 1, 1, 3, 128, 129, 2500]),
                layers=dice.choice([0, 3]),
                ranks=dice.choice([1, 4, 1449]),
                rank_norms=dice.random() < 0.5,
            )
        alone = layout.num_groups == 1
        names = [f"g{i}" for i in range(layout.num_groups)]
        rules = {
            name: dice.choice([math.inf, 0.5, 2.0, Exempt(), Exempt(in_total=True)])
            for name in dice.sample(names, min(len(names), 3))
            if dice.random() < 0.6
        }
        main = distclip.FixedNorm(dice.choice([1.0, 1.0, 0.0, math.inf]), allow_zero=True)
        assignments = assign_policies(names, rules, main, CPU)
        in_total = None if alone else torch.tensor([dice.random() < 0.8 for _ in names])
        tolerance = dice.choice([TOLERANCE, TOLERANCE, None])
        propagates, read_only, late = (dice.random() < 0.3 for _ in range(3))
        size = dice.choice([24, 48])
        kernel = fixed_on_device(layout, assignments, in_total, size, tolerance, propagates)
        words = drawn_message(dice, layout)
        rate = torch.tensor(dice.random(), dtype=torch.float64)
        scale = dice.choice([None, torch.tensor(1 / 3, dtype=torch.float64)])

        norms, decision, ready = kernel.decide(words, scale, rate, read_only, late)
        marked = None if in_total is None else in_total.tolist()
        given = layout, marked, in_total, None, assignments, size
        want_norms = read_norms(words, *given)
        want, _ = decide(assignments, want_norms, tuple(() for _ in assignments))
        finite = want_norms.finite
        ok = is_fine(want_norms, tolerance) if late else finite
        flags = resolve(want, finite, ok, read_only, propagates)
        checks = [getattr(want_norms, name) for name in CHECK_WORDS]
        vector, known = pack_numbers(
            [*checks, want_norms.total, rate, 1.0, 1.0 if scale is None else scale],
            [want_norms.agreed, finite, False, flags.clipped, flags.skipped],
            [want.coef, want_norms.rank_norms],
        )
        vector = torch.tensor(fill_in(known, vector.tolist()), dtype=torch.float64)
        applied = torch.where(finite, want.coef, 1.0)
        unscale = 1.0 if scale is None else scale
        pairs = {
            "norms": (norms.per_group, want_norms.per_group),
            "coef": (decision.coef, want.coef),
            "threshold": (decision.threshold, want.threshold),
            "clipped": (decision.clipped, want.clipped),
            "norms_after": (decision.norms_after, want.norms_after),
            "cosine": (decision.cosine, want.cosine),
            "applied": (ready.applied, applied),
            "divisors": (ready.divisors[0], applied.reciprocal().float()),
            "scaled": (ready.divisors[1], (applied * unscale).reciprocal().float()),
            "stop": (ready.stop, flags.skipped.float()),
            "layers": (norms.layer_sums, want_norms.layer_sums),
        }
        pairs |= {
            name: (getattr(status_of(ready), name), getattr(flags, name))
            for name in ("ok", "found_inf", "skipped", "clipped")
        }
        if alone:  # of several groups sums may differ in their last bits
            pairs["vector"] = ready.vector, vector
            pairs["total"] = norms.total, want_norms.total
        pairs["exact words"] = ready.vector[1:7], vector[1:7]
        pairs["further"] = ready.vector[8:], vector[8:]
        pairs["checks"] = (
            torch.stack([getattr(norms, name) for name in CHECK_WORDS[1:]]),
            torch.stack(as_tensors(checks[1:])),
        )
        pairs["ranks"] = norms.rank_norms, want_norms.rank_norms
        filled = torch.tensor(fill_in(NOTHING_KNOWN, ready.vector.tolist()), dtype=torch.float64)
        pairs["known"] = filled, ready.vector
        off = [
            name
            for name, (got, due) in pairs.items()
            if bits(got.nan_to_num(7.0) if got.is_floating_point() else got)
            != bits(due.nan_to_num(7.0) if due.is_floating_point() else due)
        ]
        # rounding takes the order of a sum away
        if not torch.equal(norms.total.nan_to_num(7.0), want_norms.total.nan_to_num(7.0)):
            off.append("total")
        out.append((off, bool(finite), bool(flags.ok), bool(flags.clipped)))
    return out


def counters(num_groups):
    """Counters and hashes after each of so many steps, by the kernel and by torch's operations:
    steps at which something differs; the last rate and skips."""
    interpreted.begin()
    draw = random.Random(0)
    weights = [[draw.getrandbits(62) | 1 for _ in range(num_groups)] for _ in range(2)]
    streak = SimpleNamespace(length=0)
    sides = []
    for by_kernel in (True, False):
        side = state.ClipperState((), (), (), weights, streak, CPU, on_host=False, is_alone=False)
        assert side._recorder is not None
        if not by_kernel:
            side._recorder = None
        sides.append(side)
    draw, off = torch.Generator().manual_seed(0), []
    for step in range(state.WINDOW + 40):
        coefs = torch.rand(num_groups, generator=draw, dtype=torch.float64)
        clipped, skipped = (torch.rand((), generator=draw) < share for share in (0.7, 0.1))
        decision = SimpleNamespace(coef=coefs, threshold=coefs * 2)
        flags = SimpleNamespace(clipped=clipped, skipped=skipped)
        seen = []
        for side in sides:
            side.update(decision, (), flags)
            rate, skips = side.history.take_latest()
            numbers = [*side.history.tensors().values(), side.last_hash, rate, skips.double()]
            seen.append([bits(number) for number in numbers])
        if seen[0] != seen[1]:
            off.append(step)
    return off, float(rate), int(skips), int(sides[0].last_hash)


def join_ranks(store, rank):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )


def on_ranks(rank_differs):
    """Four folded steps of replicas that share one hash, and what one rank's other call gives."""
    interpreted.begin()
    rank, launched = dist.get_rank(), interpreted.LAUNCHED
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 3))
    clipper = judged_late(distclip.GradClipper(model, 1.0))
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
    launched.clear()
    norms, error = [], ""
    for step in range(4):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) * 3
        if rank_differs and step == 2 and rank == 1:
            model.module.weight.grad[0, 0] += 1.0
        try:
            norms.append(float(clipper.step(optimizer).total_norm))
        except distclip.DistclipError as raised:
            error = f"{type(raised).__name__}: {raised}"
            break
    oracle = [
        math.sqrt(
            sum(
                float(
                    (torch.randn(shape, generator=torch.Generator().manual_seed(step)) * 3)
                    .double()
                    .square()
                    .sum()
                )
                for shape in ((3, 4), (3,))
            )
        )
        for step in range(4)
    ]
    return norms, oracle, [p.tolist() for p in model.parameters()], error, list(launched)


def a_deep_copy():
    """Norms that a clipper and its copy give, after a step that was left to be judged; all kernels
    are triton's, those of lists of tensors too."""
    interpreted.begin()
    kernels.kernels_for = lambda dtypes, device: "triton"
    model = nn.Linear(3, 2)
    clipper = judged_late(distclip.GradClipper(model, 1.0, on_nonfinite="propagate"))
    _fill(model, 5.0)
    clipper.clip_()
    assert clipper._runner._late._late._left is not None, "vacuous"
    other, its = copy.deepcopy((model, clipper))
    _fill(model, 7.0)
    _fill(other, 11.0)
    norms = [float(one.clip_().total_norm) for one in (clipper, its, clipper)]
    return norms, [int(one.state_dict()["history.calls"]) for one in (clipper, its)]


def _fill(model, value):
    for p in model.parameters():
        p.grad = torch.full_like(p, value)
