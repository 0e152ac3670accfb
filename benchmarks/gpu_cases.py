"""The cases on a CUDA device. Each is called with (bench) and gives its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import distclip
from benchmarks import gpu_problems as problems
from benchmarks.floors import GPU_FLOORS, GPU_MEMORY, gpu_ceiling, gpu_floor
from benchmarks.gpu_peers import AUTOMODEL, RECIPE, TORCH, Clip, gradients, per_parameter
from benchmarks.gpu_timing import Cache, Times, counts, interleaved
from benchmarks.problems import named
from benchmarks.records import Row, Spread
from benchmarks.timing import Contender, Effort, ratios
from distclip.kernels.tensor_list import TensorList

CLIP, PROPAGATE, DROP_IN = (
    "GradClipper.clip_",
    'clip_, on_nonfinite="propagate"',
    "distclip.clip_grad_norm_",
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Bench:
    effort: Effort
    cache: Cache
    read: float  # bytes a second
    both: float  # the same, reading and writing
    peers: dict[str, Clip]

    def times(self, contenders: Sequence[Contender]) -> dict[str, Times]:
        return interleaved(contenders, self.effort, self.cache)


def rows_of(case: str, what: str, times: dict[str, Times], pairs: Pairs, key: str) -> list[Row]:
    """The first pair is the main one and has the floor `key`; the others may not be slower than
    their peers."""
    rows: list[Row] = []
    whole = {name: t.whole for name, t in times.items()}
    for i, (peer, ours) in enumerate(pairs):
        device = Spread.of(
            [a / b for a, b in zip(times[peer].device, times[ours].device, strict=True)]
        )
        host = [1e6 * Spread.of(times[name].host).median for name in (peer, ours)]
        note = (
            f"kernels alone {device.median:.2f} (own "
            f"{1e3 * Spread.of(times[ours].device).median:.3f} ms); "
        )
        note += f"host {host[0]:,.0f} and {host[1]:,.0f} us"
        asked = (
            f"{key}, Automodel"
            if peer == AUTOMODEL and ours == CLIP and f"{key}, Automodel" in GPU_FLOORS
            else key
            if i == 0
            else ""
        )
        rows.append(
            Row(
                case, what, ratios(whole, peer, ours), "x", ours, peer, Spread.of(whole[peer]), Spread.of(whole[ours]),
                kernels="triton", main=i == 0, note=note, **gpu_floor(asked),
            )
        )  # fmt: skip
    return rows


def share(
    case: str,
    what: str,
    ideal: float,
    seconds: list[float],
    ours: str,
    key: str = "",
    note: str = "",
) -> Row:
    """How close a call comes to what the device's bandwidths allow."""
    value = Spread.of([ideal / each for each in seconds])
    asked = gpu_floor(key) if key in GPU_FLOORS else {}
    ours_s = Spread.of(seconds)
    return Row(
        case,
        what,
        value,
        "of 1",
        ours,
        "the device's bandwidth",
        ours_s=ours_s,
        kernels="triton",
        note=note,
        **asked,
    )


def clipping(
    bench: Bench,
    case: str,
    what: str,
    shapes: problems.Shapes,
    dtypes: Sequence[torch.dtype],
    large: bool = False,
) -> list[Row]:
    """Idle and active, against all peers; for a large list also the share of the bandwidth."""
    rows: list[Row] = []
    params = problems.parameters(shapes, dtypes)
    grads = gradients(params)
    size = sum(g.numel() * g.element_size() for g in grads)
    norm, restore = float(distclip.get_total_norm(grads)), problems.restorer(grads)
    key = f"{case} {what}".strip()
    for state, max_norm, before in (("idle", 2 * norm, None), ("active", norm / 2, restore)):
        runs = contenders(params, max_norm, bench.peers)
        times = bench.times([Contender(name, run, before) for name, run in runs.items()])
        pairs = [
            (TORCH, CLIP),
            (TORCH, PROPAGATE),
            (TORCH, DROP_IN),
            *((peer, CLIP) for peer in bench.peers if peer != TORCH),
        ]
        rows += rows_of(
            case, f"{what} {state}", times, pairs, f"{case} {state}" if large else f"{key} {state}"
        )
        if large:
            ideal = size / bench.read + (2 * size / bench.both if state == "active" else 0)
            floor = f"{case} {state}, share"
            label = (
                f"{what} {state}: one read{' and one read + write' if state == 'active' else ''}"
            )
            rows.append(share(case, label, ideal, times[CLIP].whole, CLIP, floor))
            rows.append(share(case, label, ideal, times[CLIP].device, f"{CLIP}, kernels alone"))
    if large:
        rows += kernels(bench, case, what, grads, size)
    return rows


def contenders(
    params: list[nn.Parameter], max_norm: float, peers: dict[str, Clip]
) -> dict[str, Callable[[], object]]:
    clipper = distclip.GradClipper(named(params), max_norm)
    waiting = distclip.GradClipper(named(params), max_norm, on_nonfinite="propagate")
    ours = {
        CLIP: clipper.clip_,
        PROPAGATE: waiting.clip_,
        DROP_IN: lambda: distclip.clip_grad_norm_(params, max_norm),
    }
    return {name: lambda clip=clip: clip(params, max_norm) for name, clip in peers.items()} | ours


def kernels(bench: Bench, case: str, what: str, grads: list[torch.Tensor], size: int) -> list[Row]:
    """The library's kernels by themselves."""
    listed = TensorList.of(grads)
    factors = {
        value: torch.full((len(grads),), value, dtype=torch.float64, device="cuda")
        for value in (0.999, 1.0)
    }
    bounds = torch.full((len(grads),), 1e-3, dtype=torch.float64, device="cuda")
    runs: dict[str, tuple[float, Callable[[], object]]] = {
        "power sums": (size / bench.read, lambda: listed.power_sums(2.0)),
        "scale": (2 * size / bench.both, lambda: listed.scale_(factors[0.999])),
        "clamp": (2 * size / bench.both, lambda: listed.clamp_(bounds)),
        "sums of a clamp": (size / bench.read, lambda: listed.clamped_sums(bounds, 2.0)),
    }
    times = bench.times([Contender(name, run) for name, (_, run) in runs.items()])
    rows = [
        share(case, f"{what} kernels: {name}", ideal, times[name].device, name)
        for name, (ideal, _) in runs.items()
    ]
    nothing = bench.times([Contender("", lambda: listed.scale_(factors[1.0]))])[""]
    idle = Spread.of([1e6 * seconds for seconds in nothing.device])
    return [*rows, Row(case, f"{what} kernels: scale by 1", idle, "us", "scale", kernels="triton")]


def llama(bench: Bench) -> list[Row]:
    rows: list[Row] = []
    for name, dtype in DTYPES.items():
        rows += clipping(
            bench, "llama", name, problems.llama(bench.effort.quick), [dtype], large=True
        )
        torch.cuda.empty_cache()
    return rows


def gpt2(bench: Bench) -> list[Row]:
    return [
        row
        for name, dtype in DTYPES.items()
        for row in clipping(bench, "gpt2", name, problems.gpt2(bench.effort.quick), [dtype])
    ]


def mixed(bench: Bench) -> list[Row]:
    return clipping(
        bench, "mixed", "bf16 and fp32", problems.mixed(bench.effort.quick), list(DTYPES.values())
    )


def small(bench: Bench) -> list[Row]:
    rows: list[Row] = []
    for count in (5_000, 20_000):
        rows += clipping(
            bench, "small", f"{count:,}", problems.small(count, bench.effort.quick), [torch.float32]
        )
    return rows


def scaler(bench: Bench) -> list[Row]:
    """Unscaling and clipping in place, and the whole step with a fused AdamW."""
    rows: list[Row] = []
    params = problems.parameters(problems.gpt2(bench.effort.quick), [torch.float32])
    optimizer = torch.optim.AdamW(params, lr=1e-9, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0, growth_interval=10**9)
    scaler.scale(torch.ones((), device="cuda"))  # the scale is made at the first use
    grads = gradients(params)
    restore, norm = problems.restorer(grads), float(distclip.get_total_norm(grads)) / 8
    for state, max_norm in (("idle", 2 * norm), ("active", norm / 2)):
        clipper = distclip.GradClipper(named(params), max_norm)

        def clip(max_norm: float = max_norm) -> None:
            scaler.unscale_(optimizer)
            clip_grad_norm_(params, max_norm, foreach=True)

        def step(clip: Callable[[], None] = clip) -> None:
            clip()
            scaler.step(optimizer)
            scaler.update()

        peer, ours = "unscale_ + clip_grad_norm_", "clip_(optimizer, scaler)"
        both = [
            Contender(peer, clip, restore, scaler.update),
            Contender(ours, lambda c=clipper: c.clip_(optimizer, scaler), restore, scaler.update),
        ]
        rows += rows_of(
            "scaler", f"gpt2 fp32 {state}, in place", bench.times(both), [(peer, ours)], "scaler"
        )
        peer, ours = (
            "unscale_ + clip_grad_norm_ + scaler.step + update",
            "step(optimizer, scaler=scaler)",
        )
        both = [
            Contender(peer, step, restore),
            Contender(ours, lambda c=clipper: c.step(optimizer, scaler=scaler), restore),
        ]
        rows += rows_of(
            "scaler", f"gpt2 fp32 {state}, with fused AdamW", bench.times(both), [(peer, ours)], ""
        )
    return rows


def step(bench: Bench) -> list[Row]:
    """Clip and a fused AdamW step."""
    rows: list[Row] = []
    sizes = {
        "gpt2 fp32": (problems.gpt2, torch.float32),
        "llama bf16": (problems.llama, torch.bfloat16),
    }
    for name, (shapes, dtype) in sizes.items():
        params = problems.parameters(shapes(bench.effort.quick), [dtype])
        optimizer = torch.optim.AdamW(params, lr=1e-9, fused=True)
        grads = gradients(params)
        norm, restore = float(distclip.get_total_norm(grads)), problems.restorer(grads)
        for state, max_norm, before in (("idle", 2 * norm, None), ("active", norm / 2, restore)):
            clipper = distclip.GradClipper(named(params), max_norm)

            def both(
                params: list[nn.Parameter] = params,
                max_norm: float = max_norm,
                optimizer: Any = optimizer,
            ) -> None:
                clip_grad_norm_(params, max_norm, foreach=True)
                optimizer.step()

            peer, ours = "clip_grad_norm_ + AdamW(fused).step", "step(optimizer)"
            pair = [
                Contender(peer, both, before),
                Contender(ours, lambda c=clipper, o=optimizer: c.step(o), before),
            ]
            rows += rows_of(
                "step", f"{name} {state}", bench.times(pair), [(peer, ours)], f"step {state}"
            )
    return rows


def value(bench: Bench) -> list[Row]:
    rows: list[Row] = []
    for name, dtype in DTYPES.items():
        params = problems.parameters(problems.gpt2(bench.effort.quick), [dtype])
        bound = 2.5 * sum(p.numel() for p in params) ** -0.5  # of 2.5 standard deviations
        restore = problems.restorer(gradients(params))
        clipper = distclip.GradClipper(
            named(params), policy=distclip.FixedValue(bound), on_nonfinite="propagate"
        )
        peer, ours, drop_in = (
            "torch clip_grad_value_(foreach=True)",
            "clip_, FixedValue",
            "distclip.clip_grad_value_",
        )
        three = [
            Contender(
                peer, lambda p=params, b=bound: clip_grad_value_(p, b, foreach=True), restore
            ),
            Contender(drop_in, lambda p=params, b=bound: distclip.clip_grad_value_(p, b), restore),
            # measures the norm, and how far the clamp bends the gradient, as well
            Contender(ours, clipper.clip_, restore),
        ]
        rows += rows_of(
            "value", f"gpt2 {name}", bench.times(three), [(peer, drop_in), (peer, ours)], ""
        )
    return rows


def adagc(bench: Bench) -> list[Row]:
    params = problems.parameters(problems.gpt2(bench.effort.quick), [torch.float32])
    restore = problems.restorer(gradients(params))
    policy, each = distclip.AdaGC(lambda_abs=0.5, warmup=1), distclip.per_parameter()
    clipper = distclip.GradClipper(
        named(params), policy=policy, groups=each, on_nonfinite="propagate"
    )
    peer, ours = "torch's list operations, one threshold each", "clip_, AdaGC, per_parameter()"
    pair = [
        Contender(peer, lambda: per_parameter(params, 1e-3), restore),
        Contender(ours, clipper.clip_, restore),
    ]
    return rows_of("adagc", "gpt2 fp32 active", bench.times(pair), [(peer, ours)], "")


def dtensor(bench: Bench) -> list[Row]:
    """Gradients and parameters as FSDP2 leaves them, on a mesh of one rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group(
        "nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0)
    )
    try:
        mesh = init_device_mesh("cuda", (1,))
        rows: list[Row] = []
        params: list[nn.Parameter] = []
        for plain in problems.parameters(problems.gpt2(bench.effort.quick), [torch.float32]):
            params.append(nn.Parameter(DTensor.from_local(plain.detach(), mesh, [Shard(0)])))
            params[-1].grad = DTensor.from_local(plain.grad, mesh, [Shard(0)])
        held = [grad.to_local() for grad in gradients(params)]  # pyright: ignore[reportAttributeAccessIssue]
        restore, norm = problems.restorer(held), float(distclip.get_total_norm(held))
        for state, max_norm, before in (("idle", 2 * norm, None), ("active", norm / 2, restore)):
            runs = contenders(
                params, max_norm, {name: bench.peers[name] for name in (TORCH, RECIPE)}
            )
            times = bench.times([Contender(name, run, before) for name, run in runs.items()])
            pairs = [(TORCH, CLIP), (TORCH, PROPAGATE), (TORCH, DROP_IN), (RECIPE, CLIP)]
            rows += rows_of("dtensor", f"gpt2 fp32 {state}", times, pairs, "")
        return rows
    finally:
        dist.destroy_process_group()


def graph(bench: Bench) -> list[Row]:
    """The replay of a captured step."""
    params = problems.parameters(problems.gpt2(bench.effort.quick), [torch.float32])
    norm = float(distclip.get_total_norm(gradients(params)))
    optimizers = [torch.optim.AdamW(params, lr=1e-9, fused=True, capturable=True) for _ in range(2)]
    clipper = distclip.GradClipper(named(params), 2 * norm)

    def both() -> None:
        clip_grad_norm_(params, 2 * norm, foreach=True)
        optimizers[0].step()

    peer, ours = "replay of clip_grad_norm_ + AdamW(fused).step", "replay of step(optimizer)"
    pair = [
        Contender(peer, captured(both).replay),
        Contender(ours, captured(lambda: clipper.step(optimizers[1])).replay),
    ]
    return rows_of("graph", "gpt2 fp32 idle", bench.times(pair), [(peer, ours)], "")


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        run()
    return made


def call(bench: Bench) -> list[Row]:
    """What a call on 1,000 tensors of 64 x 16 is made of: the host's time, launches, waits,
    memory."""
    params = problems.parameters(problems.small(1_000, bench.effort.quick), [torch.float32])
    grads = gradients(params)
    norm, restore = float(distclip.get_total_norm(grads)), problems.restorer(grads)
    optimizer = torch.optim.AdamW(params, lr=1e-9, fused=True)
    rows: list[Row] = []
    limit = (GPU_MEMORY[0] + GPU_MEMORY[1] * len(params)) / 2**20
    for state, max_norm, before in (("idle", 2 * norm, None), ("active", norm / 2, restore)):
        clippers = [
            distclip.GradClipper(named(params), max_norm, on_nonfinite=mode)
            for mode in ("skip", "propagate", "skip")
        ]
        runs: dict[str, Callable[[], object]] = {
            TORCH: lambda m=max_norm: clip_grad_norm_(params, m, foreach=True),
            CLIP: clippers[0].clip_,
            PROPAGATE: clippers[1].clip_,
            DROP_IN: lambda m=max_norm: distclip.clip_grad_norm_(params, m),
            "AdamW(fused).step": optimizer.step,
            "step(optimizer)": lambda c=clippers[2]: c.step(optimizer),
        }
        times = bench.times([Contender(name, run, before) for name, run in runs.items()])
        what = f"{len(params):,} tensors, {state}"
        pairs = [(TORCH, CLIP), (TORCH, PROPAGATE), (TORCH, DROP_IN)]
        rows += rows_of("call", what, times, pairs, "")
        plain = counts(runs["AdamW(fused).step"])
        for name, run in runs.items():
            mine = name in (PROPAGATE, "step(optimizer)")
            found, beside = counts(run, before), name == "step(optimizer)"
            launches = found.launches - plain.launches if beside else found.launches
            host = [1e6 * seconds for seconds in times[name].host]
            if beside:
                alone = Spread.of([1e6 * s for s in times["AdamW(fused).step"].host]).median
                host = [microseconds - alone for microseconds in host]
            label = f"{what}: {{}}{', beside the optimizer' if beside else ''}"
            figures = (
                ("host's time", Spread.of(host), "us", gpu_ceiling("host")),
                ("launches", Spread.of([launches]), "launches", gpu_ceiling("launches")),
                ("waits of the host", Spread.of([found.waits]), "waits", gpu_ceiling("waits")),
                (
                    "memory",
                    Spread.of([found.extra / 2**20]),
                    "MiB",
                    {"floor": limit, "issue": True, "at_least": False},
                ),
            )
            rows += [
                Row(
                    "call",
                    label.format(figure),
                    spread,
                    unit,
                    name,
                    kernels="triton",
                    **(asked if mine else {}),
                )
                for figure, spread, unit, asked in figures
            ]
    return rows


@dataclass(frozen=True, slots=True)
class GpuCase:
    run: Callable[[Bench], list[Row]]
    line: str


CASES = {
    "llama": GpuCase(
        llama,
        f"{problems.LLAMA:,} elements in a Llama's shapes, bf16 and fp32; the share of the "
        f"bandwidth; the kernels alone",
    ),
    "gpt2": GpuCase(gpt2, "GPT-2 124M's shapes, bf16 and fp32"),
    "mixed": GpuCase(mixed, "500 matrices of 225 million elements, bf16 and fp32 in turn"),
    "small": GpuCase(small, "5,000 and 20,000 tensors of 64 x 16"),
    "scaler": GpuCase(scaler, "GradScaler: unscale and clip in place, and the whole step"),
    "step": GpuCase(step, "clip and a fused AdamW step"),
    "value": GpuCase(value, "value clipping"),
    "adagc": GpuCase(adagc, "AdaGC with a group for each parameter"),
    "dtensor": GpuCase(dtensor, "DTensors as FSDP2 leaves them, on one rank"),
    "graph": GpuCase(graph, "the replay of a captured step"),
    "call": GpuCase(call, "1,000 tensors of 64 x 16: host's time, launches, waits, memory"),
}
