"""The device programs of `step_kernels`, in Triton's language. Imported only where triton is used.

What stands between a step's sums and its optimizers is a handful of numbers. As torch's operations
they are some fifty launches; here they are one program each for the message, the decision by
constant thresholds, and the counters.

Everything is float64 with each operation rounded by itself: what `decide_fixed` writes are the bits
that the rules of `decide/` and `policies/fixed.py` give, on another rank perhaps by torch.
"""

# Branches on constants are compiled away: see `triton_programs`.
# ruff: noqa: SIM108
# pyright: basic, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

# pieces, or groups, that are looked at side by side, by how many warps: of few numbers, of many
FEW, MANY = (128, 1), (1024, 4)


@triton.jit
def _number(value: tl.constexpr):
    """[] float64. As a plain constant it might be rounded to float32 first."""
    return tl.full((), value, tl.float64)


@triton.jit
def _is_finite(x):
    return x - x == 0


@triton.jit
def _largest_sent(x):
    """A maximum over ranks may lose a NaN: it is sent as inf."""
    return tl.where(x == x, x, float("inf"))


@triton.jit(
    do_not_specialize=[
        "pieces", "further_count", "has_error", "has_notes", "step", "call", "last",
        "mixes", "groups", "layers",
    ],
    do_not_specialize_on_alignment=[
        "power_sums", "part_sums", "order", "weights", "drift_weights", "firsts", "further",
        "presence", "found_inf", "last_hash", "inv_scale", "words",
    ],
)  # fmt: skip
def pack_words(
    power_sums, part_sums, order, weights, drift_weights, firsts, further, presence, found_inf,
    last_hash, inv_scale, words, pieces, further_count, has_error, has_notes, step, call, last,
    mixes, groups, layers, IS_MAX: tl.constexpr, MIXER: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """words, float64: this rank's message, as `exchange/message.py` describes it. A grid of one
    program for each group and layer, and one for all other words.

    Float64 but for order and firsts: power_sums [pieces], part_sums [parts]; order int32 and
    weights [pieces + parts]: which addends make up each group (pieces), then each layer (parts),
    and how much of each counts; firsts [groups + layers + 1] int32: where in them they begin;
    drift_weights [pieces], further [further_count], presence [2, or 1 of maxima]; found_inf,
    last_hash and inv_scale []. has_error, has_notes, mixes: 0 or 1; inv_scale is mixed into the
    last token or not. step, call, last: the tokens; where last is below 0 it is last_hash.
    """
    here = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    if here < groups + layers:
        begin = tl.load(firsts + here)
        end = tl.load(firsts + here + 1)
        acc = tl.zeros((LANES,), tl.float64)
        for at in range(begin, end, LANES):
            inside = at + lanes < end
            addend = tl.load(order + at + lanes, mask=inside, other=0)
            own = tl.load(power_sums + addend, mask=inside & (here < groups), other=0.0)
            own += tl.load(part_sums + addend, mask=inside & (here >= groups), other=0.0)
            if IS_MAX:
                own = _largest_sent(own)
                acc = tl.where(own > acc, own, acc)
            else:
                acc += own * tl.load(weights + at + lanes, mask=inside, other=0.0)
        if IS_MAX:
            out = tl.max(acc, 0)
        else:
            out = tl.sum(acc, 0)
        tl.store(words + here, out)
    else:
        found = tl.zeros((LANES,), tl.float64)
        drift = tl.zeros((LANES,), tl.float64)
        for at in range(0, pieces, LANES):
            inside = at + lanes < pieces
            own = tl.load(power_sums + at + lanes, mask=inside, other=0.0)
            found += tl.where(_is_finite(own), 0.0, 1.0)
            if not IS_MAX:
                drift += own * tl.load(drift_weights + at + lanes, mask=inside, other=0.0)
        to = words + groups + layers
        for at in range(0, further_count, LANES):
            inside = at + lanes < further_count
            own = tl.load(further + at + lanes, mask=inside, other=0.0)
            tl.store(to + at + lanes, own, mask=inside)
        to += further_count
        if not IS_MAX:
            tl.store(to, tl.sum(drift, 0))
            tl.store(to + 1, tl.load(presence))
            tl.store(to + 2, tl.load(presence + 1))
            to += 3
        else:
            tl.store(to, tl.load(presence))
            to += 1
        nonfinite = tl.sum(found, 0)
        given = tl.load(found_inf)
        # a NaN there is kept
        tl.store(to, tl.where(given <= nonfinite, nonfinite, given))
        tl.store(to + 1, has_error.to(tl.float64))
        tl.store(to + 2, has_notes.to(tl.float64))
        to += 3
        first = step.to(tl.float64)
        second = call.to(tl.float64)
        third = tl.where(last < 0, tl.load(last_hash), last.to(tl.float64))
        if mixes != 0:
            bits = tl.load(inv_scale).to(tl.int64, bitcast=True)
            mixed = third.to(tl.int64) + (((bits * MIXER) >> 40) & 0xFFFF)
            third = (mixed & 0xFFFF).to(tl.float64)
        tl.store(to, first)
        tl.store(to + 1, second)
        tl.store(to + 2, third)
        if IS_MAX:
            tl.store(to + 3, -first)
            tl.store(to + 4, -second)
            tl.store(to + 5, -third)
        else:
            tl.store(to + 3, first * first)
            tl.store(to + 4, second * second)
            tl.store(to + 5, third * third)


@triton.jit
def _norm_of(
    power_sums,
    IS_SQUARE: tl.constexpr,
    LARGEST: tl.constexpr,
    SHIFT: tl.constexpr,
    ODD: tl.constexpr,
    UP: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Finished and rounded, as in `p_norm.py`."""
    if IS_SQUARE:
        norms = tl.sqrt(power_sums)
    else:
        norms = power_sums
    bits = norms.to(tl.int64, bitcast=True)
    whole = (bits + ((bits >> SHIFT) & ODD) + UP) & KEPT
    return tl.where(norms <= _number(LARGEST), whole.to(tl.float64, bitcast=True), norms)


@triton.jit
def _agree(words, at, ranks, IS_MAX: tl.constexpr):
    token = tl.load(words + at)
    beside = tl.load(words + at + 3)
    if IS_MAX:
        out = token == -beside
    else:
        out = beside * ranks.to(tl.float64) == token * token
    return out


@triton.jit(
    do_not_specialize=["read_only", "late", "groups", "layers", "rank_norms", "ranks"],
    do_not_specialize_on_alignment=[
        "words", "thresholds", "in_total", "clip_rate", "inv_scale", "vector", "columns", "flags",
        "for_optimizers",
    ],
)  # fmt: skip
def decide_fixed(
    words, thresholds, in_total, clip_rate, inv_scale,
    vector, columns, flags, for_optimizers, read_only, late, groups, layers, rank_norms, ranks,
    IS_MAX: tl.constexpr, IS_SQUARE: tl.constexpr, PROPAGATES: tl.constexpr,
    TOLERANCE: tl.constexpr, PRESENCE: tl.constexpr,
    LARGEST: tl.constexpr, SHIFT: tl.constexpr, ODD: tl.constexpr, UP: tl.constexpr,
    KEPT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """What becomes of a step, from its reduced message. A grid of one program.

    words: float64, without words of policies. thresholds [groups] float64; in_total [groups] uint8;
    clip_rate and inv_scale [] float64. read_only, late: 0 or 1; late: whatever is wrong counts, not
    only what is not finite. TOLERANCE: of drift; below 0 there is none.

    Written: vector [16 + groups + ranks' norms] float64, as `step.DeviceLate` reads it: seven check
    words, total norm, clip rate, cosine (1), inverse scale, five flags (agreed, finite, left out by
    a policy (never), clipped, skipped), coefficients, ranks' norms. columns [3, groups] float64:
    norms, norms after, and the coefficients, 1 where the step is not finite. flags [6 + groups]
    uint8: agreed, finite, ok, found_inf, skipped, clipped, and whether each group is.
    for_optimizers [1 + 2 groups] float32: 1 where the step is not taken; what gradients are divided
    by; the same for those that carry the loss scale.
    """
    lanes = tl.arange(0, LANES)
    checks = words + groups + layers + rank_norms
    # how the groups add up
    power = tl.zeros((LANES,), tl.float64)
    counted = tl.zeros((LANES,), tl.float64)
    lost = tl.zeros((LANES,), tl.int32)
    for at in range(0, groups, LANES):
        inside = at + lanes < groups
        sums = tl.load(words + at + lanes, mask=inside, other=0.0)
        counts = tl.load(in_total + at + lanes, mask=inside, other=0) != 0
        some = tl.where(counts, sums, 0.0)
        if IS_MAX:
            power = tl.where(sums > power, sums, power)
            counted = tl.where(some > counted, some, counted)
            lost = lost | (sums != sums).to(tl.int32)
        else:
            power += sums
            counted += some
    if IS_MAX:
        # ranks send no NaN; if there is one all the same, nothing is right
        nothing = tl.where(tl.max(lost, 0) != 0, _number(float("nan")), _number(0.0))
        power_sum = tl.max(power, 0) + nothing
        total_sum = tl.max(counted, 0) + nothing
    else:
        power_sum = tl.sum(power, 0)
        total_sum = tl.sum(counted, 0)
    total = _norm_of(total_sum, IS_SQUARE, LARGEST, SHIFT, ODD, UP, KEPT)

    # what is wrong
    if IS_MAX:
        drift = _number(0.0)
        presence = _number(0.0)
        at_count = checks
    else:
        drift = tl.load(checks)
        presence = tl.load(checks + 1)
        at_count = checks + 2
    num_grads = tl.load(at_count)
    nonfinite = tl.load(at_count + 1)
    errors = tl.load(at_count + 2)
    notes = tl.load(at_count + 3)
    agreed = _agree(at_count, 4, ranks, IS_MAX) & _agree(at_count, 5, ranks, IS_MAX)
    agreed = (agreed & _agree(at_count, 6, ranks, IS_MAX)) | (ranks == 1)
    finite = power_sum - power_sum == nonfinite
    fine = agreed & (errors == 0) & finite & (tl.abs(presence) <= _number(PRESENCE))
    if TOLERANCE >= 0:
        fine = fine & (tl.abs(drift) <= power_sum * _number(TOLERANCE))
    ok = tl.where(late != 0, fine, finite)
    if PROPAGATES:
        acts = finite
        found_inf = finite & False
    else:
        acts = ok
        found_inf = ok == 0
    acts = acts & (read_only == 0)
    found_inf = found_inf & (read_only == 0)

    # each group
    unscale = tl.load(inv_scale)
    some_clipped = tl.zeros((LANES,), tl.int32)
    for at in range(0, groups, LANES):
        inside = at + lanes < groups
        sums = tl.load(words + at + lanes, mask=inside, other=0.0)
        threshold = tl.load(thresholds + at + lanes, mask=inside, other=float("inf"))
        norms = _norm_of(sums, IS_SQUARE, LARGEST, SHIFT, ODD, UP, KEPT)
        is_above = norms > threshold
        coef = tl.where(is_above, threshold / tl.where(is_above, norms, 1.0), 1.0)
        is_clipped = coef != 1.0
        some_clipped = some_clipped | (is_clipped & inside).to(tl.int32)
        applied = tl.where(finite, coef, 1.0)
        tl.store(vector + 16 + at + lanes, coef, mask=inside)
        tl.store(columns + at + lanes, norms, mask=inside)
        tl.store(columns + groups + at + lanes, norms * coef, mask=inside)
        tl.store(columns + 2 * groups + at + lanes, applied, mask=inside)
        tl.store(flags + 6 + at + lanes, is_clipped.to(tl.uint8), mask=inside)
        divisors = for_optimizers + 1 + at + lanes
        tl.store(divisors, (1.0 / applied).to(tl.float32), mask=inside)
        tl.store(divisors + groups, (1.0 / (applied * unscale)).to(tl.float32), mask=inside)
    clipped = (tl.max(some_clipped, 0) != 0) & acts

    tl.store(vector, power_sum)
    tl.store(vector + 1, drift)
    tl.store(vector + 2, presence)
    tl.store(vector + 3, num_grads)
    tl.store(vector + 4, nonfinite)
    tl.store(vector + 5, errors)
    tl.store(vector + 6, notes)
    tl.store(vector + 7, total)
    tl.store(vector + 8, tl.load(clip_rate))
    tl.store(vector + 9, _number(1.0))
    tl.store(vector + 10, unscale)
    tl.store(vector + 11, agreed.to(tl.float64))
    tl.store(vector + 12, finite.to(tl.float64))
    tl.store(vector + 13, _number(0.0))
    tl.store(vector + 14, clipped.to(tl.float64))
    tl.store(vector + 15, found_inf.to(tl.float64))
    for at in range(0, rank_norms, LANES):
        inside = at + lanes < rank_norms
        own = tl.load(words + groups + layers + at + lanes, mask=inside, other=0.0)
        tl.store(vector + 16 + groups + at + lanes, own, mask=inside)
    tl.store(flags, agreed.to(tl.uint8))
    tl.store(flags + 1, finite.to(tl.uint8))
    tl.store(flags + 2, ok.to(tl.uint8))
    tl.store(flags + 3, found_inf.to(tl.uint8))
    tl.store(flags + 4, found_inf.to(tl.uint8))
    tl.store(flags + 5, clipped.to(tl.uint8))
    tl.store(for_optimizers, found_inf.to(tl.float32))


@triton.jit(
    do_not_specialize=["groups"],
    do_not_specialize_on_alignment=[
        "clipped", "skipped", "coefs", "thresholds", "weights", "num_calls", "num_skips",
        "num_clipped", "clip_rate", "ring", "last_hash", "told",
    ],
)  # fmt: skip
def record_step(
    clipped, skipped, coefs, thresholds, weights,
    num_calls, num_skips, num_clipped, clip_rate, ring, last_hash, told, groups,
    WINDOW: tl.constexpr, HASHES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One more step in the counters, in place. A grid of one program.

    clipped, skipped: [] uint8; coefs, thresholds [groups] float64; weights [2, groups] int64.
    Written: num_calls, num_skips [] int64; num_clipped, clip_rate [] float64; ring [WINDOW] uint8;
    last_hash [] float64 where HASHES; told [2] float64: the rate and the skips, which no later step
    writes to.
    """
    was_clipped = tl.load(clipped)
    was_skipped = tl.load(skipped)
    turn = tl.load(num_calls)
    place = ring + turn % WINDOW
    before = tl.load(place)
    count = tl.load(num_clipped) + (was_clipped.to(tl.float64) - before.to(tl.float64))
    skips = tl.load(num_skips) + was_skipped.to(tl.int64)
    calls = turn + 1
    rate = count / tl.minimum(calls, WINDOW).to(tl.float64)
    tl.store(place, was_clipped)
    tl.store(num_clipped, count)
    tl.store(num_skips, skips)
    tl.store(num_calls, calls)
    tl.store(clip_rate, rate)
    tl.store(told, rate)
    tl.store(told + 1, skips.to(tl.float64))
    if HASHES:
        lanes = tl.arange(0, LANES)
        acc = tl.zeros((LANES,), tl.int64)
        for at in range(0, groups, LANES):
            inside = at + lanes < groups
            coef = tl.load(coefs + at + lanes, mask=inside, other=0.0)
            threshold = tl.load(thresholds + at + lanes, mask=inside, other=0.0)
            weight = tl.load(weights + at + lanes, mask=inside, other=0)
            acc += coef.to(tl.int64, bitcast=True) * weight
            weight = tl.load(weights + groups + at + lanes, mask=inside, other=0)
            acc += threshold.to(tl.int64, bitcast=True) * weight
        total = tl.sum(acc, 0)
        tl.store(last_hash, ((total >> 40) & 0xFFFF).to(tl.float64))
