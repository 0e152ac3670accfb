"""Lightning's ModelParallelStrategy with tensor parallelism on four ranks: torchrun ...
lightning_mesh_loop.py. One JSON line a rank."""

import gc
import json
import logging
import warnings

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy as FabricModelParallel
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

import distclip.testing
from distclip.integrations.lightning import GradientClipping, prepare
from problem import clipped, data, loss_of, net, off, oracle, whole

MAX_NORM, LARGEST, ROWS = 0.1, 0.02, 8
SIZES = {"data_parallel_size": 2, "tensor_parallel_size": 2, "process_group_backend": "gloo"}
PLANS = {
    "the whole in the plan": {"0": ColwiseParallel(), "2": RowwiseParallel()},
    # the second layer lies on the data-parallel mesh alone
    "a layer outside the plan": {"0": ColwiseParallel(output_layouts=Replicate())},
    "nothing in the plan": {},
}


def split(model, mesh, plan):
    if PLANS[plan]:
        parallelize_module(model, mesh["tensor_parallel"], PLANS[plan])
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh["data_parallel"])
    return model


class Regression(LightningModule):
    def __init__(self, plan):
        super().__init__()
        self.net, self.plan = net(), plan

    def configure_model(self):
        split(self.net, self.device_mesh, self.plan)

    def train_dataloader(self):
        # ranks of one tensor-parallel group see the same batch
        mine = slice(self.device_mesh["data_parallel"].get_local_rank(), None, 2)
        x, y = data(1, ROWS)
        return DataLoader(TensorDataset(x[mine], y[mine]), batch_size=ROWS // 2)

    def training_step(self, batch, index):
        return loss_of(self.net, *batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


class Counted(GradientClipping):
    """Notes what it sends at a step."""

    def on_before_optimizer_step(self, *args):
        with distclip.testing.count_collectives() as seen:
            super().on_before_optimizer_step(*args)
        self.sent = seen.names


def fitted(plan, *callbacks, **how):
    """Parameters by name, before and after one step."""
    module = Regression(plan)
    before = {n: t.detach().double().clone() for n, t in module.net.named_parameters()}
    Trainer(
        accelerator="cpu", devices=4, strategy=ModelParallelStrategy(**SIZES), logger=False,
        callbacks=list(callbacks), max_steps=1, max_epochs=-1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, **how,
    ).fit(module)  # fmt: skip
    return before, whole(module.net)


def one_step(plan):
    grads, norm = oracle(net(), *data(1, ROWS))
    wanted = clipped(grads, norm, MAX_NORM)
    callback = Counted(max_norm=MAX_NORM)
    before, now = fitted(plan, callback)
    callback.clippers[0].audit()
    told = callback.clippers[0].last_report.total_norm
    try:
        before, own = fitted(plan, gradient_clip_val=MAX_NORM)
        own = off(own, before, wanted)
    except RuntimeError as error:  # torch's norm takes one mesh
        own = str(error)
    return {
        "norm": float(norm),
        "told": float(told),
        "bits": float(told).hex(),
        "sent": callback.sent,
        "off": off(now, before, wanted),
        "own": own,
    }


def fabric_step(plan):
    """By norm, and then what is left by value."""
    fabric = Fabric(
        accelerator="cpu",
        devices=4,
        strategy=FabricModelParallel(
            parallelize_fn=lambda model, mesh: split(model, mesh, plan), **SIZES
        ),
    )
    fabric.launch()
    plain = net()
    before = {n: t.detach().double().clone() for n, t in plain.named_parameters()}
    model = fabric.setup_module(plain)
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), 1.0))
    prepare(fabric, model, max_norm=MAX_NORM)
    grads, norm = oracle(net(), *data(1, ROWS))
    x, y = data(1, ROWS)
    mine = slice(fabric.strategy.device_mesh["data_parallel"].get_local_rank(), None, 2)
    fabric.backward(loss_of(model, x[mine], y[mine]))
    with distclip.testing.count_collectives() as seen:
        told = fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
    sent = seen.names
    fabric.clip_gradients(model, optimizer, clip_val=LARGEST)
    optimizer.step()
    now = {n.removeprefix("_forward_module."): t for n, t in whole(model).items()}
    wanted = {n: g.clamp(-LARGEST, LARGEST) for n, g in clipped(grads, norm, MAX_NORM).items()}
    return {
        "norm": float(norm),
        "told": float(told),
        "bits": told.item().hex(),
        "sent": sent,
        "off": off(now, before, wanted),
        "bounded": sum(int((g.abs() == LARGEST).sum()) for g in wanted.values()),
    }


def main():
    torch.set_num_threads(1)
    gc.freeze()  # no collection, and no search for objects, goes through what was imported
    warnings.simplefilter("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    cases = {plan: one_step(plan) for plan in PLANS}
    cases |= {f"fabric, {plan}": fabric_step(plan) for plan in list(PLANS)[1:]}
    print("RESULT " + json.dumps(cases), flush=True)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


main()
