"""A loop of Accelerate's own style, with distclip's one line: torchrun ... accelerate_loop.py
STRATEGY. Prints one JSON line a rank.

`accelerate_loop.py STRATEGY FOLDER` resumes from what another run saved there.
"""

import gc
import json
import math
import os
import shutil
import sys
import tempfile
import warnings
import weakref
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import (
    Accelerator,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.algorithms.join import Join
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distclip
import distclip.testing
from accelerate_setting import as_on_gpus
from distclip.integrations.accelerate import prepare, release
from problem import HUGE, TINY, data, loss_of, net, off, oracle, whole

STRATEGY = sys.argv[1]
CONFIGS = Path(__file__).parents[2] / "configs"
if STRATEGY == "deepspeed":
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # its C++ build takes minutes, and gloo does
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def make_accelerator(steps=1, fp16=False):
    AcceleratorState._reset_state()
    GradientState._reset_state()
    if STRATEGY == "deepspeed":
        PartialState._reset_state()
        config = json.loads((CONFIGS / "deepspeed" / "zero2.json").read_text())
        plugin = DeepSpeedPlugin(
            hf_ds_config=config
            | {"train_micro_batch_size_per_gpu": 8 // steps, "gradient_accumulation_steps": steps}
        )
        gloo = InitProcessGroupKwargs(backend="gloo")
        return Accelerator(
            deepspeed_plugin=plugin, kwargs_handlers=[gloo], gradient_accumulation_steps=steps
        )
    if STRATEGY == "tp":
        as_on_gpus()
        return Accelerator(
            parallelism_config=ParallelismConfig(tp_size=2), gradient_accumulation_steps=steps
        )
    if not STRATEGY.startswith("fsdp"):
        frozen_later = DistributedDataParallelKwargs(find_unused_parameters=True)
        accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=steps, kwargs_handlers=[frozen_later]
        )
        if fp16:  # which Accelerate offers on GPUs only
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return accelerator
    as_on_gpus()
    version = int(STRATEGY[-1])
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        use_orig_params=True,
        reshard_after_forward="FULL_SHARD" if version == 1 else True,
    )
    return Accelerator(fsdp_plugin=plugin, gradient_accumulation_steps=steps)


def spread(accelerator, model):
    """What Accelerate wants done before `prepare`."""
    if STRATEGY == "tp":
        parallelize_module(
            model,
            accelerator.torch_device_mesh["tp"],
            {"0": ColwiseParallel(), "2": RowwiseParallel()},
        )
        model.tp_size = 2
    return model


def mine(accelerator, t):
    if STRATEGY == "tp":  # every rank sees the whole batch
        return t
    return t[accelerator.process_index :: accelerator.num_processes]


def one_step(max_norm=0.1, rule="norm", micro=1, part=None, fp16=False, groups=False):
    accelerator = make_accelerator(micro, fp16)
    plain = net(0)
    x, y = data(1)
    grads, norm = oracle(plain, x, y, lambda n: part is None or n.startswith(part))
    plain = spread(accelerator, plain)
    params = list(plain.parameters())
    if groups:
        params = [
            {"params": plain[0].parameters()},
            {"params": plain[2].parameters(), "momentum": 0.0},
        ]
    optimizer = torch.optim.SGD(params, 1.0)
    model, optimizer = accelerator.prepare(plain, optimizer)
    prepare(accelerator, model, max_norm=HUGE if part or rule == "value" else max_norm)
    before, notes = whole(model), []
    for xs, ys in zip(mine(accelerator, x).chunk(micro), mine(accelerator, y).chunk(micro)):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, xs, ys))
            asked = [p for n, p in model.named_parameters() if part is None or part in n]
            if rule == "norm":
                notes.append(accelerator.clip_grad_norm_(asked, max_norm))
            else:
                accelerator.clip_grad_value_(asked, max_norm)
            optimizer.step()
            optimizer.zero_grad()
    now = whole(model)
    if rule == "norm":
        coef = min(1.0, max_norm / float(norm))
        change = {
            n: g * (coef if part is None or n.startswith(part) else 1.0) for n, g in grads.items()
        }
    else:
        change = {n: g.clamp(-max_norm, max_norm) for n, g in grads.items()}
    plain_tensor = all(type(t) is torch.Tensor and t.ndim == 0 for t in notes)
    return {
        "off": off(now, before, change),
        "norm_off": abs(float(notes[-1]) / float(norm) - 1) if notes else 0.0,
        "norm": float(norm),
        "bits": notes[-1].item().hex() if notes else "",
        "idle": [math.isnan(float(t)) for t in notes[:-1]],
        "plain": plain_tensor,
    }


def two_models():
    """Two models of equal shapes, clipped apart and then together."""
    accelerator = make_accelerator()
    plain = [net(0), net(5)]
    x, y = data(1)
    wanted = [oracle(m, x, y) for m in plain]
    models = [accelerator.prepare(m, torch.optim.SGD(m.parameters(), 1.0))[0] for m in plain]
    for m in models:
        prepare(accelerator, m, max_norm=0.1)
    for m in models:
        accelerator.backward(loss_of(m, mine(accelerator, x), mine(accelerator, y)))
    apart = [float(accelerator.clip_grad_norm_(m.parameters(), 0.1)) for m in models]
    after = float(accelerator.clip_grad_norm_([p for m in models for p in m.parameters()], HUGE))
    return {
        "apart": [a / float(n) - 1 for a, (_, n) in zip(apart, wanted)],
        "after": after,
        "norm": min(float(n) for _, n in wanted),
    }


def two_optimizers_in_fp16(order):
    """Accelerate updates the scaler after each optimizer's step: none may be unscaled twice by it,
    nor by another loss's scale."""
    accelerator = make_accelerator(fp16=True)
    plain = [net(0), net(5)]
    x, y = data(1)
    wanted = [oracle(m, x, y) for m in plain]
    pairs = [accelerator.prepare(m, torch.optim.SGD(m.parameters(), 1.0)) for m in plain]
    for m, _ in pairs:
        prepare(accelerator, m, max_norm=0.1)
    before = [whole(m) for m, _ in pairs]
    for m, _ in pairs:
        accelerator.backward(loss_of(m, mine(accelerator, x), mine(accelerator, y)))
    if order == "together":
        norms = [
            float(accelerator.clip_grad_norm_((p for m, _ in pairs for p in m.parameters()), HUGE))
        ]
        exact = [math.hypot(*(float(n) for _, n in wanted))]
    else:
        if order == "overflow" and accelerator.process_index == 0:
            next(pairs[0][0].parameters()).grad[0, 0] = math.inf
        norms, exact = [], [float(n) for _, n in wanted]
        for m, o in pairs:
            norms.append(float(accelerator.clip_grad_norm_(m.parameters(), 0.1)))
            if order == "overflow":
                o.step()
    if order != "overflow":
        for _, o in pairs:
            o.step()
    coefs = [1.0 if order == "together" else min(1.0, 0.1 / float(n)) for _, n in wanted]
    now = [whole(m) for m, _ in pairs]
    first = 1 if order == "overflow" else 0
    return {
        "off": max(
            off(n, b, {k: g * c for k, g in grads.items()})
            for n, b, c, (grads, _) in list(zip(now, before, coefs, wanted))[first:]
        ),
        "norm_off": max(abs(a / b - 1) for a, b in list(zip(norms, exact))[first:]),
        "scale": accelerator.scaler.get_scale(),
    }


def part_is_not_finite():
    """The whole step is left out, not the part alone."""
    accelerator = make_accelerator()
    plain = spread(accelerator, net(0))
    model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), 1.0))
    prepare(accelerator, model, max_norm=0.1)
    x, y = data(1)
    before = whole(model)
    accelerator.backward(loss_of(model, mine(accelerator, x), mine(accelerator, y)) * math.inf)
    accelerator.clip_grad_norm_([p for n, p in model.named_parameters() if "0." in n], 0.1)
    optimizer.step()
    return all(torch.equal(t, before[n]) for n, t in whole(model).items())


def unfrozen():
    """Parameters that begin to train after `prepare` belong to the model that it was told."""
    accelerator = make_accelerator()
    plain = net(0)
    model, _ = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), 1.0))
    for p in list(model.parameters())[:2]:
        p.requires_grad_(False)
    clipper = prepare(accelerator, model, max_norm=0.1)
    for p in model.parameters():
        p.requires_grad_(True)
    x, y = data(1)
    accelerator.backward(loss_of(model, mine(accelerator, x), mine(accelerator, y)))
    norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
    return {
        "norm_off": abs(float(norm) / float(oracle(net(0), x, y)[1]) - 1),
        "calls": clipper.last_report.step,
    }


def local(t):
    """This rank's part."""
    return (t.to_local() if hasattr(t, "to_local") else t).detach().clone()


def two_turns(part, max_norm=0.7):
    """A GAN's generator and discriminator: whose turn it is not is frozen, and its gradients of its
    own turn are still there."""
    accelerator = make_accelerator()
    plain = spread(accelerator, net(0))
    named = dict(plain.named_parameters())
    groups = {p: [t for n, t in named.items() if n.startswith(p)] for p in ("0.", "2.")}
    if STRATEGY in ("single", "ddp"):
        model, *_ = accelerator.prepare(plain, *(torch.optim.SGD(g, 1e-3) for g in groups.values()))
    else:  # FSDP2 exchanges the parameters of one optimizer
        model, _ = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), 1e-3))
    prepare(accelerator, model, max_norm=max_norm)
    names = {p: [n for n, _ in model.named_parameters() if p in f"{n}"] for p in ("0.", "2.")}
    now = dict(model.named_parameters())
    out = []
    for seed, turn in enumerate(("2.", "0.", "2.", "0.")):
        asked = [now[n] for n in names[turn]]
        for n, p in now.items():
            p.requires_grad_(n in names[turn])
        for p in asked:
            p.grad = None
        stale = {
            n: local(p.grad) for n, p in now.items() if n not in names[turn] and p.grad is not None
        }
        x, y = data(seed)
        grads, norm = oracle(net(0), x, y, lambda n, turn=turn: n.startswith(turn))
        accelerator.backward(loss_of(model, mine(accelerator, x), mine(accelerator, y)) * 10)
        with distclip.testing.count_collectives() as seen:
            if part == "value":
                accelerator.clip_grad_value_(asked, 0.5)
                wanted = {n: (g * 10).clamp(-0.5, 0.5) for n, g in grads.items()}
            else:  # as a generator, with one of them twice
                told = accelerator.clip_grad_norm_(
                    iter([*asked, asked[0]]), max_norm if part == "whole" else 0.3
                )
                coef = min(1.0, (max_norm if part == "whole" else 0.3) / float(norm * 10))
                wanted = {n: g * 10 * coef for n, g in grads.items()}
        after = {
            n.replace("module.", "").replace("_fsdp_wrapped_module.", ""): p.grad
            for n, p in now.items()
            if n in names[turn]
        }
        after = {
            n: (g.full_tensor() if hasattr(g, "full_tensor") else g).double()
            for n, g in after.items()
        }
        out.append(
            {
                "norm": float(norm) * 10,
                "norm_off": 0.0 if part == "value" else abs(float(told) / float(norm * 10) - 1),
                "grad_off": max(
                    float((g - wanted[n]).abs().max() / wanted[n].abs().max())
                    for n, g in after.items()
                ),
                "stale": len(stale),
                "stale_kept": all(torch.equal(local(now[n].grad), g) for n, g in stale.items()),
                "collectives": len(seen.names),
            }
        )
    return out


def passed_as_they_are():
    """Frozen ones too, if they have a gradient; one tensor; none, on every rank."""
    accelerator = make_accelerator()
    plain = net(0)
    model, _ = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), 1.0))
    prepare(accelerator, model, max_norm=HUGE)
    x, y = data(1)
    accelerator.backward(loss_of(model, mine(accelerator, x), mine(accelerator, y)))
    every = list(model.parameters())
    exact = lambda params: math.sqrt(sum(float(p.grad.double().square().sum()) for p in params))  # noqa: E731
    out = {}
    every[0].requires_grad_(False)
    out["frozen"] = [exact(every), float(accelerator.clip_grad_norm_(every, HUGE))]
    out["trainable"] = [exact(every[1:]), float(accelerator.clip_grad_norm_(every[1:], HUGE))]
    out["one"] = [exact(every[1:2]), float(accelerator.clip_grad_norm_(every[1], HUGE))]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        none = float(accelerator.clip_grad_norm_(iter(()), 1.0))
    # one part is not finite: what the frozen one's optimizer holds is not stepped either
    every[1].grad[0] = math.inf
    accelerator.clip_grad_norm_(every[1:], HUGE)
    return out | {
        "none": none,
        "said": str(seen[0].message)[:47],
        "left": sum(p.grad is not None for p in every),
    }


def in_no_optimizer():
    """What is passed counts, and it is said once."""
    accelerator = make_accelerator()
    plain = net(0)
    model, _ = accelerator.prepare(plain, torch.optim.SGD(plain[2].parameters(), 1.0))
    prepare(accelerator, model, max_norm=0.1)
    x, y = data(1)
    norm = float(oracle(net(0), x, y)[1])
    said = []
    for _ in range(2):
        model.zero_grad()
        accelerator.backward(loss_of(model, mine(accelerator, x), mine(accelerator, y)))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            told = float(accelerator.clip_grad_norm_(model.parameters(), 0.1))
        said.append([str(w.message) for w in seen if w.filename == __file__])
    return {"norm_off": abs(told / norm - 1), "said": said}


def a_part_in_fp16():
    """A scaler knows an optimizer as a whole: what is not clipped is unscaled all the same,
    once."""
    accelerator = make_accelerator(fp16=True)
    plain = net(0)
    model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), 1.0))
    prepare(accelerator, model, max_norm=0.1)
    before = whole(model)
    x, y = data(1)
    grads, _ = oracle(net(0), x, y)
    accelerator.backward(loss_of(model, mine(accelerator, x), mine(accelerator, y)))
    norms = {}
    for part in ("0.", "2."):
        asked = [p for n, p in model.named_parameters() if part in n]
        exact = math.sqrt(
            sum(float(g.square().sum()) for n, g in grads.items() if n.startswith(part))
        )
        norms[part] = [
            exact,
            float(accelerator.clip_grad_norm_(asked, 0.1 if part == "0." else HUGE)),
        ]
    optimizer.step()
    first = min(1.0, 0.1 / norms["0."][0])
    wanted = {n: g * (first if n.startswith("0.") else 1.0) for n, g in grads.items()}
    return {
        "norms": norms,
        "off": off(whole(model), before, wanted),
        "scale": accelerator.scaler.get_scale(),
    }


def prepared_again():
    """A second `prepare` takes the first one's place; `free_memory` forgets."""
    accelerator = make_accelerator()
    own = accelerator.clip_grad_norm_
    plain = net(0)
    model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), 1.0))
    prepare(accelerator, model, max_norm=0.05)
    prepare(accelerator, model, max_norm=0.1)
    x, y = data(1)
    accelerator.backward(loss_of(model, mine(accelerator, x), mine(accelerator, y)))
    grads, norm = oracle(net(0), x, y)
    told, before = float(accelerator.clip_grad_norm_(model.parameters(), 0.1)), whole(model)
    optimizer.step()
    out = {
        "norm": float(norm),
        "norm_off": abs(told / float(norm) - 1),
        "saved": len(accelerator._custom_objects),
    }
    out["off"] = off(
        whole(model), before, {n: g * min(1.0, 0.1 / float(norm)) for n, g in grads.items()}
    )
    kept = weakref.ref(plain[0].weight)
    accelerator.free_memory()
    try:
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
    except ValueError as error:
        out["forgotten"] = str(error)
    del plain, model, optimizer
    gc.collect()
    out |= {"alive": kept() is not None, "saved after": len(accelerator._custom_objects)}
    plain = net(0)
    model = accelerator.prepare(plain)
    release(accelerator, prepare(accelerator, model, max_norm=0.1))
    return out | {"own again": accelerator.clip_grad_norm_ == own}


def repeated():
    """Clips of the same objects, and of others in between: each by its exact norm. What is counted
    is how often modules were gone through."""
    accelerator = make_accelerator()
    plain = net(0)
    model, _ = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), 1.0))
    prepare(accelerator, model, max_norm=0.1)
    every = list(model.parameters())
    x, y = data(1)
    walks, own = [], torch.nn.Module.parameters
    out = {"norms": [], "after": [], "walks": []}

    def counted(module, recurse=True):
        walks.append(module)
        return own(module, recurse)

    def clip(passed, max_norm=0.1):
        for p in every:
            p.grad = None
        accelerator.backward(loss_of(model, mine(accelerator, x), mine(accelerator, y)))
        exact = math.sqrt(sum(float(p.grad.double().square().sum()) for p in passed))
        walks.clear()
        torch.nn.Module.parameters = counted
        try:
            told = accelerator.clip_grad_norm_(passed, max_norm)
        finally:
            torch.nn.Module.parameters = own
        after = math.sqrt(sum(float(p.grad.double().square().sum()) for p in passed))
        out["norms"].append([exact, float(told)])
        out["after"].append(after)
        out["walks"].append(len(walks))

    for _ in range(3):
        clip(every)
    clip(every[:2])  # begins as the others do: what was known of them goes
    clip(every)
    clip(every)
    # another optimizer, of another model, which is clipped in turn with this one
    other = net(5)
    accelerator.prepare(torch.optim.SGD(other.parameters(), 1.0))
    clip(every)
    clip(every)
    try:
        clip(every, 0.5)
    except ValueError as error:
        out["refused"] = str(error)
    if STRATEGY == "single":  # DDP does not know what joins later
        plain.late = torch.nn.Parameter(torch.ones(3))
        plain.late.grad = torch.ones(3)
        out["late"] = [math.sqrt(sum(float(p.grad.double().square().sum()) for p in every))]
        out["late"].append(float(accelerator.clip_grad_norm_(every, 0.1)))
        out["late"].append(plain.late.grad.tolist())
    return out


def joined():
    """Inside torch's Join, which `join_uneven_inputs` opens on GPUs: refused, for a whole model
    before anything is sent."""
    accelerator = make_accelerator()
    plain = net(0)
    model, _ = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), 1.0))
    prepare(accelerator, model, max_norm=0.1)
    x, y = data(1)
    texts = []
    for call in (
        lambda: accelerator.clip_grad_norm_(model.parameters(), 0.1),
        lambda: accelerator.clip_grad_norm_(list(model.parameters())[:2], 0.1),
        lambda: accelerator.clip_grad_value_(model.parameters(), 0.1),
    ):
        with distclip.testing.count_collectives() as seen, Join([model]):
            accelerator.backward(loss_of(model, mine(accelerator, x), mine(accelerator, y)))
            before = len(seen.names)
            try:
                call()
            except ValueError as error:
                texts.append([str(error), len(seen.names) - before])
    accelerator.backward(loss_of(model, mine(accelerator, x), mine(accelerator, y)))
    return {"texts": texts, "after": float(accelerator.clip_grad_norm_(model.parameters(), 0.1))}


def overflow():
    """fp16 with a scaler: an overflow of one optimizer leaves the other's scale and step alone
    until its own clip."""
    accelerator = make_accelerator(fp16=True)
    plain = [net(0), net(5)]
    pairs = [accelerator.prepare(m, torch.optim.SGD(m.parameters(), 1.0)) for m in plain]
    for m, _ in pairs:
        prepare(accelerator, m, max_norm=0.1)
    x, y = data(1)
    moved = []
    for bad in (True, False):
        before = [whole(m) for m, _ in pairs]
        for m, o in pairs:
            o.zero_grad()
            accelerator.backward(loss_of(m, mine(accelerator, x), mine(accelerator, y)))
        if bad and accelerator.process_index == 0:
            next(pairs[0][0].parameters()).grad[0, 0] = math.inf
        for m, o in pairs:
            accelerator.clip_grad_norm_(m.parameters(), 0.1)
            o.step()
        moved.append(
            [
                any(not torch.equal(b[n], now[n]) for n in b)
                for b, now in zip(before, [whole(m) for m, _ in pairs])
            ]
        )
    return {"moved": moved, "scale": accelerator.scaler.get_scale()}


def compiled():
    """Norms of three steps, of the model as it is and compiled by inductor; None without a
    compiler."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        return None
    from torch._inductor import config

    # for a short compilation: no trials of the machine's vector instructions, no precompiled
    # headers, no pool of processes
    config.cpp.simdlen, config.cpp_cache_precompile_headers, config.compile_threads = 1, False, 1
    out = {}
    for backend in ("no", "inductor"):
        AcceleratorState._reset_state()
        GradientState._reset_state()
        accelerator = Accelerator(cpu=True, dynamo_backend=backend)
        plain = net(0)
        model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), 0.5))
        prepare(accelerator, model, max_norm=0.1)
        out[backend] = []
        for seed in range(3):
            accelerator.backward(loss_of(model, *data(seed)))
            out[backend].append(float(accelerator.clip_grad_norm_(model.parameters(), 0.1)))
            optimizer.step()
            optimizer.zero_grad()
    stats = torch._dynamo.utils.counters
    graphs = stats["inductor"]["fxgraph_cache_miss"] + stats["inductor"]["fxgraph_cache_hit"]
    return out | {"kind": type(model).__name__, "graphs": graphs}


def refusals():
    accelerator = make_accelerator()
    plain = net(0)
    model, _ = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), 1.0))
    other = net(3)
    texts = []
    prepare(accelerator, model, max_norm=1.0)
    x, y = data(1)
    accelerator.backward(loss_of(model, mine(accelerator, x), mine(accelerator, y)))
    for call in (
        lambda: accelerator.clip_grad_norm_(model.parameters(), 0.5),
        lambda: accelerator.clip_grad_norm_(other.parameters(), 0.5),
        lambda: accelerator.clip_grad_norm_(list(model.parameters())[:1], None),
        lambda: prepare(accelerator, max_norm=1.0),
        lambda: prepare(accelerator, model, max_norm=1.0, grad_of=lambda p: p.grad),
    ):
        try:
            call()
            texts.append("")
        except ValueError as error:
            texts.append(str(error))
    return {"texts": texts}


def checkpoints():
    """The state of an adaptive policy goes with save_state and load_state."""
    from distclip import AutoClip

    def clips(accelerator, model, clipper, steps):
        for step in steps:
            x, y = data(step)
            model.zero_grad()
            accelerator.backward(loss_of(model, mine(accelerator, x), mine(accelerator, y)))
            accelerator.clip_grad_norm_(model.parameters(), None)
        # parameters never move: the norms are those of any world size
        return [t.tolist() for t in clipper.state_dict().values() if isinstance(t, torch.Tensor)]

    states, folder = [], [tempfile.mkdtemp() if int(os.environ.get("RANK", 0)) == 0 else None]
    if len(sys.argv) > 2:
        folder = [sys.argv[2]]
    for resumed in (False, True) if len(sys.argv) == 2 else (True,):
        accelerator = make_accelerator()
        if accelerator.num_processes > 1:
            dist.broadcast_object_list(folder)
        model = accelerator.prepare(net(0))
        clipper = prepare(accelerator, model, policy=AutoClip(window=8))
        if resumed:
            accelerator.load_state(folder[0])
        else:
            clips(accelerator, model, clipper, range(3))
            accelerator.save_state(folder[0])
        states.append(clips(accelerator, model, clipper, range(3, 6)))
    return {
        "equal": states[0] == states[-1],
        "step": states[-1][0],
        "folder": folder[0],
        "state": states[-1],
    }


def deepspeed_refusals():
    accelerator = make_accelerator()
    plain = net(0)
    model, _ = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), 1.0))
    prepare(accelerator, model, max_norm=1.0)
    texts = []
    for call in (
        lambda: accelerator.clip_grad_norm_(model.parameters(), 0.5),
        lambda: accelerator.clip_grad_norm_(list(model.parameters())[:1], 1.0),
        lambda: accelerator.clip_grad_value_(model.parameters(), 0.5),
        lambda: accelerator.clip_grad_norm_(model.parameters(), 1.0),
    ):
        try:
            call()
            texts.append("")
        except ValueError as error:
            texts.append(str(error))
    return {"texts": texts}


def main():
    torch.set_num_threads(1)
    gc.freeze()  # no collection, and no search for objects, goes through what was imported
    if len(sys.argv) > 2:
        print("RESULT " + json.dumps({"checkpoints": checkpoints()}), flush=True)
        return
    cases = {
        "clip": one_step,
        "tiny": lambda: one_step(TINY),
        "huge": lambda: one_step(HUGE),
        "groups": lambda: one_step(groups=True),
        "accumulate": lambda: one_step(micro=2),
    }
    if STRATEGY == "deepspeed":
        cases |= {"refusals": deepspeed_refusals}
    else:
        cases |= {
            "value": lambda: one_step(0.05, rule="value"),
            "part": lambda: one_step(part="0."),
            "part_bad": part_is_not_finite,
        }
    if STRATEGY not in ("deepspeed", "fsdp1"):
        cases |= {
            f"turns {part}": lambda part=part: two_turns(part)
            for part in ("whole", "part", "value")
        }
    if STRATEGY in ("single", "ddp"):
        cases |= {
            "passed": passed_as_they_are,
            "in_no_optimizer": in_no_optimizer,
            "part_fp16": a_part_in_fp16,
            "again": prepared_again,
            "repeated": repeated,
        }
    if STRATEGY == "single":
        cases["compiled"] = compiled
    if STRATEGY == "ddp" and find_spec("distclip.torch_internals.join"):
        cases |= {"joined": joined}
    if STRATEGY not in ("deepspeed", "tp"):
        cases |= {"two_models": two_models, "refusals": refusals}
    if STRATEGY in ("single", "ddp"):
        cases |= {
            "fp16": lambda: one_step(fp16=True),
            "overflow": overflow,
            "checkpoints": checkpoints,
            "unfrozen": unfrozen,
        }
        cases |= {
            f"fp16 {order}": lambda order=order: two_optimizers_in_fp16(order)
            for order in ("apart", "together", "overflow")
        }
    print("RESULT " + json.dumps({name: run() for name, run in cases.items()}), flush=True)
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


main()
