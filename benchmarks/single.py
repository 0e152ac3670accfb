"""One process: clipping alone, with a scaler, with a fused step, and the overhead of Python."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

import distclip
from benchmarks import problems
from benchmarks.floors import ceiling, floor
from benchmarks.records import Row, Spread
from benchmarks.timing import Contender, Effort, interleaved, one, quiet, ratios, reader

TORCH, FOREACH, RECIPE = (
    "torch clip_grad_norm_",
    "torch clip_grad_norm_(foreach=True)",
    "torchtitan's recipe",
)
CLIP, DROP_IN = "GradClipper.clip_", "distclip.clip_grad_norm_"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rows_of(
    case: str,
    what: str,
    times: dict[str, list[float]],
    pairs: list[tuple[str, str]],
    kernels: str,
    key: str,
    **more,
) -> list[Row]:
    """The first pair is the main one and has the floor `key`; the others may not be slower than
    their peers."""
    return [
        Row(
            case, what, ratios(times, peer, ours), "x", ours, peer, Spread.of(times[peer]), Spread.of(times[ours]),
            kernels=kernels, main=i == 0, **floor(key if i == 0 else "", kernels), **more,
        )
        for i, (peer, ours) in enumerate(pairs)
    ]  # fmt: skip


def recipe(params: list, max_norm: float) -> None:
    """What torchtitan does to be able to reduce over pipeline stages; here on plain tensors."""
    grads = [p.grad for p in params if p.grad is not None]
    clip_grads_with_norm_(params, max_norm, get_total_norm(grads, 2.0), None)


def contenders(
    params: list, max_norm: float, clipper: distclip.GradClipper
) -> dict[str, Callable[[], object]]:
    return {
        TORCH: lambda: clip_grad_norm_(params, max_norm),
        FOREACH: lambda: clip_grad_norm_(params, max_norm, foreach=True),
        RECIPE: lambda: recipe(params, max_norm),
        CLIP: clipper.clip_,
        DROP_IN: lambda: distclip.clip_grad_norm_(params, max_norm),
    }


def clipping(
    case: str, shapes: Callable[[bool], problems.Shapes], effort: Effort, kernels: str
) -> list[Row]:
    rows: list[Row] = []
    for dtype_name, dtype in DTYPES.items():
        params = problems.parameters(shapes(effort.quick), dtype)
        grads = [p.grad for p in params if p.grad is not None]
        norm = float(distclip.get_total_norm(grads))
        restore = problems.restorer(grads)
        for state, max_norm, before in (("idle", 2 * norm, None), ("active", norm / 2, restore)):
            clipper = distclip.GradClipper(problems.named(params), max_norm)
            times = interleaved(
                [
                    Contender(name, run, before)
                    for name, run in contenders(params, max_norm, clipper).items()
                ],
                effort,
            )
            what = f"{dtype_name} {state}"
            pairs = [(TORCH, CLIP), (FOREACH, CLIP), (RECIPE, CLIP), (TORCH, DROP_IN)]
            rows += rows_of(case, what, times, pairs, kernels, f"{case} {what}")
            restore()
        rows.append(share_of_bandwidth(case, dtype_name, params, effort, kernels))
    return rows


def share_of_bandwidth(case: str, dtype: str, params: list, effort: Effort, kernels: str) -> Row:
    """How close `measure` comes to one read of the gradients at the speed that this machine reads
    with."""
    clipper = distclip.GradClipper(problems.named(params), math.inf)
    read, size = reader(16 if effort.quick else 256)
    times = interleaved([Contender("read", read), Contender("measure", clipper.measure)], effort)
    wanted = sum(p.grad.numel() * p.grad.element_size() for p in params)
    shares = [
        (wanted / ours) / (size / raw)
        for raw, ours in zip(times["read"], times["measure"], strict=True)
    ]
    bandwidth = Spread.of([size / raw / 1e9 for raw in times["read"]])
    limits = floor("share of read bandwidth" if (case, dtype) == ("gpt2", "fp32") else "", kernels)
    limits = limits if limits["issue"] else {}
    note = f"read bandwidth in the same rounds: {bandwidth.median:.1f} GB/s"
    return Row(
        case, f"{dtype} share of the read bandwidth", Spread.of(shares), "of 1", "GradClipper.measure", "one read at full speed",
        ours_s=Spread.of(times["measure"]), kernels=kernels, note=note, **limits,
    )  # fmt: skip


def gpt2(effort: Effort, kernels: str) -> list[Row]:
    return clipping("gpt2", problems.gpt2, effort, kernels)


def small(effort: Effort, kernels: str) -> list[Row]:
    return clipping("small", problems.small, effort, kernels)


def tiny(effort: Effort, kernels: str) -> list[Row]:
    """So little to read that the call itself is timed: the least of calls in a row, since in turns
    with others each would mostly wait for its own code and data to come back into the caches."""
    rows: list[Row] = []
    calls = 5 if effort.quick else 300
    for count in (10,) if effort.quick else (10, 100, 1000):
        params = problems.parameters([(8, 8)] * count)
        grads = [p.grad for p in params if p.grad is not None]
        norm, restore = float(distclip.get_total_norm(grads)), problems.restorer(grads)
        for state, max_norm in (("idle", 2 * norm), ("active", norm / 2)):
            clipper = distclip.GradClipper(problems.named(params), max_norm)
            named = contenders(params, max_norm, clipper)
            with quiet():
                times = {
                    name: [min(one(Contender(name, named[name], restore)) for _ in range(calls))]
                    for name in (TORCH, CLIP, DROP_IN)
                }
            what = f"{count:,} of 8 x 8, {state}"
            pairs = [(TORCH, CLIP), (TORCH, DROP_IN)]
            note = f"the least of {calls} calls in a row"
            rows += rows_of("tiny", what, times, pairs, kernels, f"tiny {count} {state}", note=note)
            restore()
    return rows


def huge(effort: Effort, kernels: str) -> list[Row]:
    return clipping("huge", problems.huge, effort, kernels)


def scaler(effort: Effort, kernels: str) -> list[Row]:
    """Mixed precision: unscaling and clipping, and the whole step."""
    rows: list[Row] = []
    params = problems.parameters(problems.gpt2(effort.quick))
    optimizer = torch.optim.AdamW(params, lr=1e-9, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**9)
    scaler.scale(torch.ones(()))  # the scale is made at the first use
    grads = [p.grad for p in params if p.grad is not None]
    restore, update = problems.restorer(grads), scaler.update
    norm = float(distclip.get_total_norm(grads)) / 8
    for state, max_norm in (("idle", 2 * norm), ("active", norm / 2)):
        clipper = distclip.GradClipper(problems.named(params), max_norm)

        def clip(max_norm: float = max_norm) -> None:
            scaler.unscale_(optimizer)
            clip_grad_norm_(params, max_norm)

        def step(clip: Callable[[], None] = clip) -> None:
            clip()
            scaler.step(optimizer)
            scaler.update()

        peer, ours = "unscale_ + clip_grad_norm_", "clip_(optimizer, scaler)"
        both = [
            Contender(peer, clip, restore, update),
            Contender(ours, lambda c=clipper: c.clip_(optimizer, scaler), restore, update),
        ]
        times = interleaved(both, effort)
        rows += rows_of(
            "scaler", f"fp32 {state}, in place", times, [(peer, ours)], kernels, "unscale and clip"
        )
        peer, ours = (
            "unscale_ + clip_grad_norm_ + scaler.step + update",
            "step(optimizer, scaler=scaler)",
        )
        both = [
            Contender(peer, step, restore),
            Contender(ours, lambda c=clipper: c.step(optimizer, scaler=scaler), restore),
        ]
        times = interleaved(both, effort)
        rows += rows_of(
            "scaler", f"fp32 {state}, with fused AdamW", times, [(peer, ours)], kernels, ""
        )
    return rows


def step(effort: Effort, kernels: str) -> list[Row]:
    """Clip and a fused AdamW step: distclip folds the coefficient into the optimizer's own pass."""
    rows: list[Row] = []
    params = problems.parameters(problems.gpt2(effort.quick))
    optimizer = torch.optim.AdamW(params, lr=1e-9, fused=True)
    grads = [p.grad for p in params if p.grad is not None]
    norm, restore = float(distclip.get_total_norm(grads)), problems.restorer(grads)
    for state, max_norm, before in (("idle", 2 * norm, None), ("active", norm / 2, restore)):
        folding = distclip.GradClipper(problems.named(params), max_norm)
        in_place = distclip.GradClipper(problems.named(params), max_norm, fold="never")

        def both(max_norm: float = max_norm) -> None:
            clip_grad_norm_(params, max_norm)
            optimizer.step()

        peer, ours, unfolded = (
            "clip_grad_norm_ + AdamW(fused).step",
            "step(optimizer)",
            'step(optimizer), fold="never"',
        )
        three = [
            Contender(peer, both, before),
            Contender(ours, lambda c=folding: c.step(optimizer), before),
            Contender(unfolded, lambda c=in_place: c.step(optimizer), before),
        ]
        times = interleaved(three, effort)
        rows += rows_of(
            "step",
            f"fp32 {state}",
            times,
            [(peer, ours), (peer, unfolded)],
            kernels,
            f"clip and fused step, {state}",
        )
    return rows


def overhead(effort: Effort, kernels: str) -> list[Row]:
    """What a call costs where there is next to nothing to read: 1,000 parameters of 8 elements."""
    count = 100 if effort.quick else 1000
    params = problems.parameters([(8,)] * count)
    clipper = distclip.GradClipper(problems.named(params), 1e9)
    peer = lambda: clip_grad_norm_(params, 1e9)  # noqa: E731
    times = interleaved([Contender(TORCH, peer), Contender(CLIP, clipper.clip_)], effort)
    what = f"{count:,} parameters of 8 elements"
    rows = rows_of("overhead", what, times, [(TORCH, CLIP)], kernels, "")
    milliseconds = Spread.of([1e3 * seconds for seconds in times[CLIP]])
    limit = {} if effort.quick else ceiling("1,000 parameters", kernels)
    return [
        *rows,
        Row("overhead", f"{what}, one call", milliseconds, "ms", CLIP, kernels=kernels, **limit),
    ]
