"""Experts and pipeline stages of DeepSpeed on four ranks, with distclip's one line and with
DeepSpeed's own clipping; prints what each case found."""

import json
import math
import re
import zlib

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

import distclip
import distclip.testing
from deepspeed_setting import DTYPES, change, config_of, loss_scale, masters_of
from distclip.integrations.deepspeed import attach
from problem import loss_of, net, off, oracle

MAX_NORM = 0.1
WIDTH, EXPERTS, EXPERT_RANKS = 6, 4, 2
_LOCAL_EXPERT = re.compile(r"(?<=deepspeed_experts\.)\d+")


SIZES = {"into.": 1.5, "moe.deepspeed_moe.gate.": 1.5, "moe.deepspeed_moe.experts.": 0.1}


def drawn(name, shape, dtype=torch.float32):
    """A value for a parameter or for data, by name. Experts are small, so that most of the
    gradient's norm is theirs."""
    source = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    size = next((size for start, size in SIZES.items() if name.startswith(start)), 0.7)
    return (torch.randn(shape, generator=source) * size).to(dtype)


def batch(dtype, width=WIDTH):
    rows = 4 * dist.get_world_size()
    return drawn("x", (rows, WIDTH), dtype), drawn("y", (rows, width), dtype)


def oracle_of(names, forward, x, y, split):
    """Gradients in float64 of the mean of `split` parts' losses, by name, and their norm."""
    params = {n: p.double().requires_grad_() for n, p in names.items()}
    parts = zip(x.double().chunk(split), y.double().chunk(split))
    sum((forward(params, xs) - ys).square().mean() / split for xs, ys in parts).backward()
    grads = {n: p.grad for n, p in params.items()}
    return grads, math.sqrt(sum(float(g.norm()) ** 2 for g in grads.values()))


# ------------------------------------------------------------------------------------- experts


class Mixture(torch.nn.Module):
    def __init__(self, expert_ranks):
        super().__init__()
        self.into = torch.nn.Linear(WIDTH, WIDTH)
        self.moe = MoE(
            WIDTH,
            torch.nn.Linear(WIDTH, WIDTH),
            num_experts=EXPERTS,
            ep_size=expert_ranks,
            drop_tokens=False,
            use_rts=False,
        )

    def forward(self, x):
        return self.moe(torch.tanh(self.into(x)))[0]


def mixture(p, x):
    """The same without DeepSpeed: each row goes to one expert, times its gate."""
    x = torch.tanh(x @ p["into.weight"].T + p["into.bias"])
    gates = torch.softmax(x @ p["moe.deepspeed_moe.gate.wg.weight"].T, 1)
    gate, chosen = gates.max(1)
    out = torch.zeros_like(x)
    for e in range(EXPERTS):
        at = f"moe.deepspeed_moe.experts.deepspeed_experts.{e}."
        rows = (chosen == e)[:, None]
        out = out + rows * gate[:, None] * (x @ p[at + "weight"].T + p[at + "bias"])
    return out


def over_all_ranks(name, expert_ranks):
    """The name of an expert counted over all ranks, where this rank's begin at 0."""
    first = dist.get_rank() % expert_ranks * (EXPERTS // expert_ranks)
    return _LOCAL_EXPERT.sub(lambda found: str(first + int(found[0])), name)


def experts_engine(stage, dtype, expert_ranks=EXPERT_RANKS, **options):
    torch.manual_seed(0)
    model = Mixture(expert_ranks)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(drawn(over_all_ranks(name, expert_ranks), param.shape))
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all"}
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(groups, 1.0),
        config=config_of(stage, dtype, **options),
    )
    return engine


def whole_names():
    one = Mixture(1)
    return {n: drawn(n, p.shape) for n, p in one.named_parameters()}


def experts_step(engine, stage, dtype, expert_ranks=EXPERT_RANKS):
    """Steps once; how far the update is from the gradients in float64, and by what it is short of
    them."""
    x, y = batch(DTYPES[dtype])
    grads, norm = oracle_of(
        {n: p.to(DTYPES[dtype]) for n, p in whole_names().items()}, mixture, x, y, 1
    )
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
    before = masters_of(engine, stage)
    with distclip.testing.count_collectives() as seen:
        engine.backward(loss_of(engine, x[mine], y[mine]))
        backward = len(seen.names)
        engine.step()
    after = masters_of(engine, stage)
    wanted = {n: grads[over_all_ranks(n, expert_ranks)] for n in before}
    moved = change(before, after)
    return {
        "norm": norm,
        "off": off(after, before, {n: g * min(1.0, MAX_NORM / norm) for n, g in wanted.items()}),
        "length": distinct_length(moved, expert_ranks),
        "collectives": len(seen.names) - backward,
    }


def distinct_length(moved, expert_ranks):
    """The norm of the whole model's update: each expert once."""
    own = sum(float(m.norm()) ** 2 for n, m in moved.items() if "deepspeed_experts" in n)
    shared = sum(float(m.norm()) ** 2 for n, m in moved.items() if "deepspeed_experts" not in n)
    copies = dist.get_world_size() // expert_ranks
    total = torch.tensor(own / copies, dtype=torch.float64)
    dist.all_reduce(total)
    return math.sqrt(shared + float(total))


def experts(stage, dtype, expert_ranks=EXPERT_RANKS):
    engine = experts_engine(stage, dtype, expert_ranks)
    clipper = attach(engine, MAX_NORM)
    out = experts_step(engine, stage, dtype, expert_ranks)
    report = clipper.last_report
    out["norm_off"] = abs(float(report.total_norm) / out["norm"] - 1)
    out["bits"] = float(report.total_norm).hex()
    out["engine_norm"] = float(engine.get_global_grad_norm()) == float(report.total_norm)
    return out


def experts_by_themselves():
    """A norm for each expert, whichever rank holds it."""
    engine = experts_engine("2", "fp32")
    groups = distclip.by_name({f"*deepspeed_experts.{e}.*": 0.02 for e in range(EXPERTS)})
    clipper = attach(engine, MAX_NORM, groups=groups)
    x, y = batch(torch.float32)
    grads, _ = oracle_of(whole_names(), mixture, x, y, 1)
    experts_step(engine, "2", "fp32")
    wanted = [
        math.sqrt(
            sum(float(g.norm()) ** 2 for n, g in grads.items() if f"deepspeed_experts.{e}." in n)
        )
        for e in range(EXPERTS)
    ]
    return {"wanted": wanted, "seen": clipper.last_report.group_norms[:EXPERTS].tolist()}


def own_clipping_of_experts(stage, dtype):
    """DeepSpeed's own clipping of the same step: how long the update is that should be as long as
    the threshold."""
    engine = experts_engine(stage, dtype, clipping=MAX_NORM)
    out = experts_step(engine, stage, dtype)
    reported = engine.get_global_grad_norm()  # None without ZeRO in float32
    return {
        "norm": out["norm"],
        "length": out["length"],
        "reported": None if reported is None else float(reported),
    }


# ------------------------------------------------------------------------------------- pipeline

PIPES = {"plain": ("0", "6"), "tied": ("tied_modules.ends",) * 2}


def pipe_layers(kind):
    if kind == "tied":
        end = TiedLayerSpec(
            "ends", torch.nn.Linear, WIDTH, WIDTH, tied_weight_attr=["weight", "bias"]
        )
    else:
        end = LayerSpec(torch.nn.Linear, WIDTH, WIDTH)
    return [
        end,
        torch.nn.Tanh(),
        LayerSpec(torch.nn.Linear, WIDTH, 10),
        torch.nn.Tanh(),
        LayerSpec(torch.nn.Linear, 10, WIDTH),
        torch.nn.Tanh(),
        end,
    ]


def pipe(kind):
    names = [PIPES[kind][0], "2", "4", PIPES[kind][1]]

    def forward(p, x):
        for i, name in enumerate(names):
            x = torch.tanh(x) if i else x
            x = x @ p[f"{name}.weight"].T + p[f"{name}.bias"]
        return x

    return forward


def pipe_names(kind):
    shapes = {"2": (10, WIDTH), "4": (WIDTH, 10)}
    layers = dict.fromkeys([PIPES[kind][0], "2", "4", PIPES[kind][1]])
    out = {}
    for name in layers:
        shape = shapes.get(name, (WIDTH, WIDTH))
        out |= {f"{name}.weight": drawn(name, shape), f"{name}.bias": drawn(name + "b", shape[:1])}
    return out


def pipe_engine(kind, stage, dtype, **options):
    model = PipelineModule(
        pipe_layers(kind),
        num_stages=2,
        loss_fn=lambda out, y: (out - y).square().mean(),
        partition_method="uniform",
    )
    values = pipe_names(kind)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(values[name])
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), 1.0),
        config=config_of(stage, dtype, micro=2, **options),
    )
    return engine


def pipeline(kind, stage, dtype):
    engine = pipe_engine(kind, stage, dtype)
    clipper = attach(engine, MAX_NORM)
    low = DTYPES[dtype]
    # each of two pipelines takes two micro-batches of two rows
    x, y = (part[:8] for part in batch(low))
    grads, norm = oracle_of(
        {n: p.to(low) for n, p in pipe_names(kind).items()}, pipe(kind), x, y, 4
    )
    copy = engine.grid.get_data_parallel_rank()
    mine = zip(x.chunk(4)[2 * copy : 2 * copy + 2], y.chunk(4)[2 * copy : 2 * copy + 2])
    before = masters_of(engine, stage)
    engine.train_batch(iter(list(mine)))
    after = masters_of(engine, stage)
    report = clipper.last_report
    return {
        "norm": norm,
        "norm_off": abs(float(report.total_norm) / norm - 1),
        "off": off(after, before, {n: grads[n] * (MAX_NORM / norm) for n in before}),
        "bits": float(report.total_norm).hex(),
        "engine_norm": float(engine.get_global_grad_norm()) == float(report.total_norm),
        "calls": report.step,
        "names": sorted(before),
    }


def refused(kind, stage, dtype):
    engine = pipe_engine(kind, stage, dtype)
    try:
        attach(engine, MAX_NORM)
    except ValueError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------- others, on one problem


def two_engines():
    """As of a generator and a discriminator: each has its threshold and its report."""
    started = []
    for seed, max_norm in ((0, 0.1), (1, 0.3)):
        model = net(seed)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), 1.0),
            config=config_of("1", "fp32"),
        )
        started.append((engine, attach(engine, max_norm), max_norm, oracle(net(seed), *dense())[1]))
    x, y = dense()
    rank = dist.get_rank()
    out = {"norms": [], "lengths": [], "calls": []}
    for engine, *_ in started:  # both backward passes before the first step
        engine.backward(loss_of(engine, x[4 * rank :][:4], y[4 * rank :][:4]))
    for engine, clipper, max_norm, norm in started:
        before = masters_of(engine, "1")
        engine.step()
        moved = change(before, masters_of(engine, "1"))
        out["norms"].append([float(clipper.last_report.total_norm), float(norm), max_norm])
        out["lengths"].append(math.sqrt(sum(float(m.norm()) ** 2 for m in moved.values())))
        out["calls"].append(clipper.last_report.step)
    return out


def dense():
    return drawn("x", (16, 6)) * 4, drawn("y", (16, 4))


def growth(own):
    """The loss scale grows at every second step; the lengths of the clipped gradients, by
    DeepSpeed's own clipping or by distclip's. The norm is between once and twice the threshold."""
    rate, max_norm = 0.01, 0.6
    model = net()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), rate),
        config=config_of(
            "1",
            "fp16",
            scale={"loss_scale_window": 2, "initial_scale_power": 4},
            clipping=max_norm if own else 0.0,
        ),
    )
    if not own:
        attach(engine, max_norm)
    x, y = (part.half() for part in dense())
    rank, out = dist.get_rank(), {"lengths": [], "norms": [], "scales": []}
    for _ in range(5):
        before = masters_of(engine, "1")
        engine.backward(loss_of(engine, x[4 * rank :][:4], y[4 * rank :][:4]))
        engine.step()
        moved = change(before, masters_of(engine, "1"))
        length = math.sqrt(sum(float(m.norm()) ** 2 for m in moved.values()))
        out["lengths"].append(length / rate)
        out["norms"].append(float(engine.get_global_grad_norm()))
        out["scales"].append(loss_scale(engine, "1"))
    return out


def main():
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    out = {
        "two_engines": two_engines(),
        "growth": [growth(own=True), growth(own=False)],
        "experts": {
            name: experts(*name.split())
            for name in ("0 fp32", "0 bf16", "1 fp32", "2 fp32", "1fp32acc bf16")
        },
        "whole_experts": experts("1", "fp32", expert_ranks=1),
        "experts_by_themselves": experts_by_themselves(),
        "own": {
            name: own_clipping_of_experts(*name.split())
            for name in ("0 fp32", "0 bf16", "1 fp32", "1fp32acc bf16")
        },
        # last: DeepSpeed's other engines cannot be built after one with a pipeline
        "pipeline": {
            name: pipeline(*name.split())
            for name in (
                "plain 0 fp32",
                "tied 0 fp32",
                "plain 1 fp32",
                "plain 1fp32acc bf16",
                "plain 1immediatefp32acc bf16",
                "plain 1 fp16",
            )
        },
        "refused": [refused("tied", "1", "fp32"), refused("tied", "1fp32acc", "bf16")],
    }
    print("RESULT " + json.dumps(out), flush=True)
    dist.barrier()
    dist.destroy_process_group()


main()
