"""A DeepSpeed loop with distclip's one line: `deepspeed_loop.py STAGE DTYPE` on every rank; prints what each case found."""

import gc
import json
import math
import sys

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param

import distclip
import distclip.testing
from distclip.integrations.deepspeed import attach
from problem import HUGE, TINY, data, loss_of, net, off, oracle

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its C++ build takes minutes, and gloo does
STAGE, DTYPE = sys.argv[1], sys.argv[2]
LOW = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[DTYPE]


def config(micro=1, scale=None, clipping=0.0):
    zero = {"stage": int(STAGE[0]), "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 8}
    if "offload" in STAGE:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    out = {
        "train_micro_batch_size_per_gpu": 4 // micro,
        "gradient_accumulation_steps": micro,
        "gradient_clipping": clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if DTYPE == "bf16":
        out["bf16"] = {"enabled": True}
        if "fp32acc" in STAGE:
            out["data_types"] = {"grad_accum_dtype": "fp32"}
    if DTYPE == "fp16":
        out["fp16"] = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1} | (scale or {})
    return out


def masters(engine):
    """Full float32 parameters by name, as the optimizer steps them."""
    out = {}
    for name, param in engine.module.named_parameters():
        if STAGE[0] == "0":
            wrapped = engine.optimizer
            groups = getattr(wrapped, "fp32_groups", None)
            if groups is not None:
                pairs = zip(wrapped.fp16_groups, groups)
                param = next(m for lows, highs in pairs for low, m in zip(lows, highs) if low is param)
            elif hasattr(wrapped, "fp32_groups_flat"):
                for lows, flat in zip(wrapped.fp16_groups, wrapped.fp32_groups_flat):
                    sizes = [low.numel() for low in lows]
                    for low, part in zip(lows, flat.split(sizes)):
                        if low is param:
                            found = part.view(low.shape)
                param = found
            out[name] = param.detach().double().clone()
        else:
            out[name] = safe_get_full_fp32_param(param).detach().double().clone()
    return out


def expected(x, y):
    """From the parameters and inputs as they are rounded."""
    grads, norm = oracle(net().to(LOW), x, y)
    return grads, float(norm)


def batch():
    return data(1, 4 * dist.get_world_size(), LOW)


def started(max_norm=None, micro=1, split=False, momentum=0.0, scale=None, by_param_group=False, **options):
    model = net()
    params = [{"params": model[0].parameters()}, {"params": model[2].parameters()}] if split else list(model.parameters())
    optimizer = torch.optim.SGD(params, 1.0, momentum=momentum)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(micro, scale))
    if by_param_group:
        options["groups"] = distclip.per_param_group(engine.optimizer)
    return engine, attach(engine, max_norm, **options)


def train(engine, x, y, micro=1, factor=1.0):
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
    for xs, ys in zip(x[mine].chunk(micro), y[mine].chunk(micro)):
        engine.backward(loss_of(engine, xs, ys) * factor)
        engine.step()


def change(before, after):
    return {n: before[n] - after[n] for n in before}


def one_step(max_norm, micro=1, reference=None, **options):
    engine, clipper = started(max_norm, micro, **options)
    x, y = batch()
    before = masters(engine)
    with distclip.testing.count_collectives() as seen:
        train(engine, x, y, micro)
    after = masters(engine)
    moved = change(before, after)
    grads, norm = expected(x, y)
    report = clipper.last_report
    coef = min(1.0, max_norm / norm) if max_norm is not None else 1.0
    out = {
        "norm": norm,
        "norm_off": abs(float(report.total_norm) / norm - 1),
        "engine_norm": engine.get_global_grad_norm() == float(report.total_norm),
        "coef": float(report.coefs[0]),
        "off": off(after, before, {n: g * coef for n, g in grads.items()}),
        "bits": float(report.total_norm).hex(),
        "calls": report.step,
        "collectives": len(seen.names),
        "moved": max(float(m.abs().max()) for m in moved.values()),
    }
    if reference is not None:  # the same step without clipping, scaled: exact whatever the gradients were rounded to
        out["scaled_off"] = off(after, before, {n: g * float(report.coefs[0]) for n, g in reference.items()})
    return out, moved


def without_distclip():
    """How many collectives DeepSpeed's own clipping takes."""
    model = net()
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), 1.0), config=config(clipping=0.1))
    x, y = batch()
    with distclip.testing.count_collectives() as seen:
        train(engine, x, y)
    return {"collectives": len(seen.names)}


def by_groups():
    """Each param group by a norm of its own."""
    engine, clipper = started(0.2, split=True, by_param_group=True)
    x, y = batch()
    before = masters(engine)
    train(engine, x, y)
    after = masters(engine)
    grads, _ = expected(x, y)
    norms = [math.sqrt(sum(float(g.norm()) ** 2 for n, g in grads.items() if n.startswith(part))) for part in ("0.", "2.")]
    wanted = {n: g * min(1.0, 0.2 / norms[0 if n.startswith("0.") else 1]) for n, g in grads.items()}
    return {"groups": list(clipper.plan.groups), "off": off(after, before, wanted), "norms": norms}


def clamped():
    engine, _ = started(None, policy=distclip.FixedValue(0.03))
    x, y = batch()
    before = masters(engine)
    train(engine, x, y)
    moved = change(before, masters(engine))
    return {"largest": max(float(m.abs().max()) for m in moved.values())}


def loss_scale(engine):
    return float(engine.optimizer.loss_scale if STAGE[0] != "0" else engine.optimizer.loss_scale_config.cur_scale)


def growth():
    """fp16: the loss scale grows at every second step; no clip changes by it."""
    engine, clipper = started(0.05, scale={"loss_scale_window": 2, "initial_scale_power": 4})
    x, y = batch()
    lengths, scales = [], []
    for _ in range(6):
        before = masters(engine)
        train(engine, x, y)
        moved = change(before, masters(engine))
        assert float(clipper.last_report.total_norm) > 0.05, "vacuous"
        lengths.append(math.sqrt(sum(float(m.norm()) ** 2 for m in moved.values())))
        scales.append(loss_scale(engine))
    return {"lengths": lengths, "scales": scales}


def skipping():
    """A spike that the policy leaves out, and a gradient that is not finite."""
    spikes = distclip.SkipSpikes(distclip.FixedNorm(0.05), factor=20.0, warmup=2)
    engine, clipper = started(None, policy=spikes, momentum=0.9)
    out = {"moved": [], "skipped": [], "scale": [], "engine": [], "nonfinite": []}
    x, y = batch()
    for factor in (1.0, 1.0, 1.0, 300.0, 1.0, math.inf, 1.0):
        before = masters(engine)
        train(engine, x, y, factor=factor)
        out["moved"].append(any(bool((m != 0).any()) for m in change(before, masters(engine)).values()))
        out["skipped"].append(bool(clipper.last_report.skipped))
        out["nonfinite"].append(int(clipper.last_report.nonfinite) > 0)
        out["engine"].append(engine.skipped_steps)
        if DTYPE == "fp16":
            out["scale"].append(loss_scale(engine))
    return out


def refusals():
    model = net()
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), 1.0), config=config(clipping=1.0))
    texts = []
    for options in ({}, {"take_over": True, "fold": "never"}, {"take_over": True}, {}):
        try:
            attach(engine, 0.1, **options)
            texts.append(str(engine.gradient_clipping()))
        except ValueError as error:
            texts.append(str(error))
    return texts


def missing():
    model = net()
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), 1.0), config=config())
    name = {"1": "averaged_gradients", "2": "averaged_gradients", "3": "averaged_gradients"}.get(STAGE[0])
    if name is None or not hasattr(engine.optimizer, name):
        return None
    delattr(engine.optimizer, name)
    try:
        attach(engine, 0.1)
    except ValueError as error:
        return str(error).replace(deepspeed.__version__, "X")
    return ""


def main():
    torch.set_num_threads(1)
    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed offers fp16 on GPUs only; gloo and the CPU can
    if "fused" in STAGE:  # FusedAdam needs a GPU; its wrapper is the same for any optimizer
        deepspeed.runtime.engine.FusedAdam = torch.optim.SGD
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    huge, unclipped = one_step(HUGE)
    cases = {
        "huge": huge,
        "clip": one_step(0.1, reference=unclipped)[0],
        "tiny": one_step(TINY, reference=unclipped)[0],
        "two_groups": one_step(0.1, split=True, reference=unclipped)[0],
        "accumulate": one_step(0.1, micro=2)[0],
        "without_distclip": without_distclip(),
        "by_groups": by_groups(),
        "clamped": clamped(),
        "skipping": skipping(),
        "refusals": refusals(),
        "missing": missing(),
    }
    if DTYPE == "fp16":
        cases["growth"] = growth()
    print("RESULT " + json.dumps(cases), flush=True)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


main()
