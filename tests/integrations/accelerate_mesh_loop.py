"""Accelerate's ParallelismConfig on four ranks, with distclip's one line: torchrun ...
accelerate_mesh_loop.py. Prints one JSON line a rank."""

import gc
import json
import os

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distclip.testing
from accelerate_setting import as_on_gpus
from distclip.integrations.accelerate import prepare
from problem import clipped, data, loss_of, net, off, oracle, whole

MAX_NORM, LARGEST = 0.1, 0.01
PLANS = {
    "whole": {"0": ColwiseParallel(), "2": RowwiseParallel()},
    # the second layer lies on the data-parallel mesh alone
    "part": {"0": ColwiseParallel(output_layouts=Replicate())},
    "none": {},
}


def by_hand(plan, over):
    """Tensor parallelism and then FSDP2 on Accelerate's mesh, before `prepare`."""

    def spread(accelerator, model):
        mesh = accelerator.torch_device_mesh
        if PLANS[plan]:
            parallelize_module(model, mesh["tp"], PLANS[plan])
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh[over])
        model.tp_size = 2  # by which Accelerate knows that it was split

    return {"tp_size": 2, "dp_shard_size": 2}, False, spread


CASES = {
    "tp and fsdp2": by_hand("whole", "dp_shard"),
    "on a flattened mesh": by_hand("whole", "dp_shard_cp"),
    "a layer outside the plan": by_hand("part", "dp_shard"),
    "nothing in the plan": by_hand("none", "dp_shard"),
    "hsdp by the plugin": ({"dp_replicate_size": 2, "dp_shard_size": 2}, True, None),
    # which Accelerate shards over the data-parallel ranks, and says that it has split nothing
    "not split, by the plugin": ({"tp_size": 2, "dp_shard_size": 2}, True, None),
}


def prepared(sizes, plugin, spread, plain):
    AcceleratorState._reset_state()
    GradientState._reset_state()
    as_on_gpus()
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # which a plugin sets
    fsdp2 = FullyShardedDataParallelPlugin(fsdp_version=2) if plugin else None
    accelerator = Accelerator(
        parallelism_config=ParallelismConfig(**sizes),
        fsdp_plugin=fsdp2,
    )
    if spread:
        spread(accelerator, plain)
    model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), 1.0))
    return accelerator, model, optimizer


def full(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def stepped(case, rule):
    sizes, *how = CASES[case]
    plain = net(0)
    x, y = data(1)
    grads, norm = oracle(plain, x, y)
    accelerator, model, optimizer = prepared(sizes, *how, plain)
    # ranks of one tp group see the same batch
    copies = sizes.get("tp_size", 1)
    mine = slice(accelerator.process_index // copies, None, accelerator.num_processes // copies)
    before = whole(model)
    accelerator.backward(loss_of(model, x[mine], y[mine]))
    kept = [p.grad.clone() for p in model.parameters()]
    own = float(full(accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)))
    for p, grad in zip(model.parameters(), kept):
        p.grad = grad
    clipper = prepare(accelerator, model, max_norm=MAX_NORM)
    out = {"norm": float(norm), "own": own}
    if rule == "value":
        accelerator.clip_grad_value_(model.parameters(), LARGEST)
        wanted = {n: g.clamp(-LARGEST, LARGEST) for n, g in grads.items()}
    else:
        with distclip.testing.count_collectives() as seen:
            told = accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        wanted = clipped(grads, norm, MAX_NORM)
        out |= {"told": float(told), "bits": told.item().hex(), "sent": seen.names}
        clipper.audit()
    optimizer.step()
    return out | {"off": off(whole(model), before, wanted)}


def main():
    torch.set_num_threads(1)
    gc.freeze()  # no collection, and no search for objects, goes through what was imported
    cases = {case: stepped(case, "norm") for case in CASES}
    cases["value"] = stepped("a layer outside the plan", "value")
    print("RESULT " + json.dumps(cases), flush=True)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


main()
