"""What each rank runs under torchrun: `-m benchmarks.loops FRAMEWORK STRATEGY PARAMETERS
[--quick]`; prints the times of rank 0's rounds."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist

import distclip
from benchmarks import problems
from benchmarks.layouts import WIDTH, fill, linears
from benchmarks.on_ranks import in_turns, message
from benchmarks.timing import QUICK, Effort


def accelerate(strategy: str, count: int, effort: Effort) -> dict[str, Any]:
    """The peer is the accelerator's method as it was before `prepare`."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    from distclip.integrations.accelerate import prepare

    if strategy == "fsdp2":  # which Accelerate offers on accelerators only
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState(backend="gloo")
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        accelerator = Accelerator(
            fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
        )
    else:
        accelerator = Accelerator(cpu=True)
    model = prepared(accelerator, count)
    params = list(model.parameters())
    restore = problems.restorer(local_grads(params))
    peer = accelerator.clip_grad_norm_
    norm = float(peer(params, 1e30))
    lone = prepared(accelerator, count) if strategy == "ddp" else None
    out: dict[str, Any] = {}
    for state, limit, before in (("idle", 2 * norm, None), ("active", norm / 2, restore)):
        clipper = prepare(accelerator, model, max_norm=limit)
        ours = accelerator.clip_grad_norm_
        runs = {
            "accelerator.clip_grad_norm_": lambda limit=limit: peer(params, limit),
            "the same, prepared by distclip": lambda limit=limit, ours=ours: ours(params, limit),
        }
        befores = before and dict.fromkeys(runs, before)
        if lone is not None:
            prepare(accelerator, lone, max_norm=limit, process_group=distclip.LOCAL)
            own = list(lone.parameters())
            name = "the same, prepared by distclip, local part"
            runs[name] = lambda limit=limit, ours=ours, own=own: ours(own, limit)
            if befores:
                befores[name] = problems.restorer(local_grads(own))
        times = in_turns(runs, effort, befores)
        out[state] = times | message(clipper.plan.words, effort) | {"parameters": count}
        restore()
    return out


def prepared(accelerator: Any, count: int) -> torch.nn.Module:
    """A model with gradients, and an optimizer that steps it."""
    plain = linears(count)
    model, _ = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), 0.1))
    fill(model)
    return model


def local_grads(params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    grads: list[Any] = [p.grad for p in params if p.grad is not None]
    return [g.to_local() if hasattr(g, "to_local") else g for g in grads]


def deepspeed(strategy: str, count: int, effort: Effort) -> dict[str, Any]:
    """Two engines with equal models; what is timed is `engine.step()`."""
    import deepspeed as ds

    from distclip.integrations.deepspeed import attach

    # its C++ build takes minutes, and gloo does
    ds.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ds.init_distributed(dist_backend="gloo", verbose=False)

    def engine(clipping: float) -> Any:
        torch.manual_seed(0)
        model = linears(count)
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": clipping,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        return ds.initialize(
            model=model, optimizer=torch.optim.SGD(model.parameters(), 1e-9), config=config
        )[0]

    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))

    def backward(engine: Any) -> None:
        engine.backward(1e3 * engine(x).square().mean())

    probe = engine(1e30)
    backward(probe)
    probe.step()
    norm = float(probe.get_global_grad_norm())
    out: dict[str, Any] = {}
    for state, limit in (("idle", 2 * norm), ("active", norm / 2)):
        theirs, ours = engine(limit), engine(0.0)
        clipper = attach(ours, limit)
        runs = {"engine.step()": theirs.step, "engine.step(), attached": ours.step}
        before = dict(zip(runs, (lambda e=theirs: backward(e), lambda e=ours: backward(e))))
        out[state] = (
            in_turns(runs, effort, before)
            | message(clipper.plan.words, effort)
            | {"parameters": count}
        )
    return out


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    framework, strategy, count, *rest = sys.argv[1:]
    effort = QUICK if rest else Effort()
    measure = {"accelerate": accelerate, "deepspeed": deepspeed}[framework]
    found = measure(strategy, int(count), effort)
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(found), flush=True)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


main()
