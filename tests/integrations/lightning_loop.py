"""A LightningModule with distclip's callback, and a Fabric loop: torchrun ... lightning_loop.py STRATEGY. One JSON line a rank."""

import gc
import json
import logging
import math
import os
import sys
import tempfile
import warnings

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision as FabricMixedPrecision
from lightning.fabric.strategies import DDPStrategy as FabricDDP
from lightning.fabric.strategies import ModelParallelStrategy as FabricModelParallel
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import distclip
from distclip.integrations.lightning import GradientClipping, prepare
from problem import HUGE, TINY, clipped, data, loss_of, moved, net, off, oracle, whole

STRATEGY = sys.argv[1]
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
ROWS = 8


def shards(model, mesh):
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


class Regression(LightningModule):
    def __init__(self, steps="all", fused=False, factor=1.0):
        super().__init__()
        self.net, self.steps, self.fused, self.factor = net(), steps, fused, factor

    def configure_model(self):
        if STRATEGY == "fsdp2" and self.device_mesh is not None:
            shards(self.net, self.device_mesh)

    def training_step(self, batch, index):
        return loss_of(self.net, *batch) * self.factor

    def configure_optimizers(self):
        params = {
            "all": lambda: list(self.parameters()),
            "groups": lambda: [{"params": self.net[0].parameters()}, {"params": self.net[2].parameters(), "weight_decay": 0.0}],
            "part": lambda: list(self.net[2].parameters()),
        }[self.steps]()
        return torch.optim.SGD(params, 1.0, fused=self.fused)


class ClipsToo(Regression):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val=0.5)


class Two(LightningModule):
    """Manual optimization of two nets by two optimizers."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = net(0), net(5)

    def training_step(self, batch, index):
        for optimizer, part in zip(self.optimizers(), (self.a, self.b)):
            optimizer.zero_grad()
            self.manual_backward(loss_of(part, *batch))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 1.0) for part in (self.a, self.b)]


def strategy(kind):
    if STRATEGY == "single":
        return "auto"
    if STRATEGY == "ddp":
        return (DDPStrategy if kind == "trainer" else FabricDDP)(process_group_backend="gloo", find_unused_parameters=True)
    sizes = {"data_parallel_size": WORLD, "tensor_parallel_size": 1, "process_group_backend": "gloo"}
    return ModelParallelStrategy(**sizes) if kind == "trainer" else FabricModelParallel(parallelize_fn=shards, **sizes)


def trainer(callback, **more):
    return Trainer(
        accelerator="cpu", devices=WORLD, strategy=strategy("trainer"), callbacks=[callback], logger=False, max_epochs=-1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, **more,
    )  # fmt: skip


def loader(micro=1):
    x, y = (t[RANK::WORLD] for t in data(1, ROWS))
    return DataLoader(TensorDataset(x, y), batch_size=ROWS // WORLD // micro)


def one_step(max_norm, micro=1, steps="all"):
    module, callback = Regression(steps), GradientClipping(max_norm=max_norm)
    before = {n.removeprefix("net."): p.detach().double().clone() for n, p in module.named_parameters()}
    run = trainer(callback, max_steps=1, accumulate_grad_batches=micro)
    run.fit(module, loader(micro))
    now = {n.removeprefix("net."): p for n, p in whole(module).items()}
    logged = {key: float(value) for key, value in run.logged_metrics.items()}
    return found(now, before, max_norm, callback.clippers[0].last_report, "2." if steps == "part" else "") | {"logged": logged}


def found(now, before, max_norm, report, part=""):
    grads, norm = oracle(net(), *data(1, ROWS), lambda n: n.startswith(part))
    now, before, grads = ({n: t for n, t in all.items() if n.startswith(part)} for all in (now, before, grads))
    return {
        "off": off(now, before, clipped(grads, norm, max_norm)),
        "norm": float(norm),
        "norm_off": abs(float(report.total_norm) / float(norm) - 1),
        "bits": float(report.total_norm).hex(),
        "calls": report.step,
        "moved": moved(now, before),
    }


def two_optimizers():
    module, callback = Two(), GradientClipping(max_norm=0.1)
    before = whole(module)
    trainer(callback, max_steps=2).fit(module, loader())
    now = whole(module)
    out = {}
    for part, seed in (("a", 0), ("b", 5)):
        grads, norm = oracle(net(seed), *data(1, ROWS))
        wanted = clipped(grads, norm, 0.1)
        select = lambda all, p=part + ".": {n.removeprefix(p): t for n, t in all.items() if n.startswith(p)}  # noqa: E731
        out[part] = {"off": off(select(now), select(before), wanted), "norm": float(norm)}
    return out


def in_fp16(max_norm, factor=1.0, fused=False):
    """Lightning takes bf16 for 16-mixed on a CPU; given as a plugin, fp16 and its scaler run there as on a GPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    module, callback = Regression(fused=fused, factor=factor), GradientClipping(max_norm=max_norm)
    before = {n.removeprefix("net."): p.detach().double().clone() for n, p in module.named_parameters()}
    trainer(callback, max_steps=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]).fit(module, loader())
    now = {n.removeprefix("net."): p for n, p in whole(module).items()}
    return found(now, before, max_norm, callback.clippers[0].last_report) | {"scale": scaler.get_scale()}


def both_clip():
    texts = []
    for module, more in ((Regression(), {"gradient_clip_val": 0.5}), (ClipsToo(), {})):
        try:
            trainer(GradientClipping(max_norm=1.0), max_steps=1, **more).fit(module, loader())
        except ValueError as error:
            texts.append(str(error))
    try:
        GradientClipping(max_norm=1.0, grad_of=lambda p: p.grad)
    except ValueError as error:
        texts.append(str(error))
    return texts


def resumed():
    """The policy's state goes with Lightning's checkpoint."""
    folder = [tempfile.mkdtemp()]
    if WORLD > 1:
        dist.broadcast_object_list(folder)
    policy = distclip.AutoClip(window=8)
    first = GradientClipping(policy=policy)
    run = trainer(first, max_steps=2)
    run.fit(Regression(), loader())
    run.save_checkpoint(f"{folder[0]}/a.ckpt")
    run.strategy.barrier()
    second = GradientClipping(policy=policy)
    trainer(second, max_steps=3).fit(Regression(), loader(), ckpt_path=f"{folder[0]}/a.ckpt", weights_only=False)
    return {"before": int(first.clippers[0].state_dict()["step"]), "after": int(second.clippers[0].state_dict()["step"])}


def by_parts():
    """Two optimizers of one module under fp16: each part by its own norm, each unscaled once, one update of the scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    precision = FabricMixedPrecision("16-mixed", "cpu", scaler)
    fabric = Fabric(accelerator="cpu", devices=WORLD, strategy=strategy("fabric"), plugins=[precision])
    fabric.launch()
    plain = net()
    before = whole(plain)
    model, *optimizers = fabric.setup(plain, *(torch.optim.SGD(part.parameters(), 1.0) for part in (plain[0], plain[2])))
    prepare(fabric, model, max_norm=0.1)
    x, y = (t[RANK::WORLD] for t in data(1, ROWS))
    fabric.backward(loss_of(model, x, y))
    norms = [float(fabric.clip_gradients(model, optimizer, max_norm=0.1)) for optimizer in optimizers]
    for optimizer in optimizers:
        optimizer.step()
    now = {n.removeprefix("_forward_module.").removeprefix("module."): p for n, p in whole(model).items()}
    out = {"scale": scaler.get_scale()}
    for part, seen in zip(("0.", "2."), norms):
        grads, norm = oracle(net(), *data(1, ROWS), lambda n, part=part: n.startswith(part))
        wanted = clipped({n: g for n, g in grads.items() if n.startswith(part)}, norm, 0.1)
        select = lambda all, part=part: {n: t for n, t in all.items() if n.startswith(part)}  # noqa: E731
        out[part] = {"off": off(select(now), select(before), wanted), "norm": float(norm), "norm_off": abs(seen / float(norm) - 1)}
    return out


def fabric_steps():
    fabric = Fabric(accelerator="cpu", devices=WORLD, strategy=strategy("fabric"))
    fabric.launch()
    out = {}
    for name, max_norm in {"clip": 0.1, "tiny": TINY, "huge": HUGE, "value": None}.items():
        plain = net()
        before = whole(plain)
        if STRATEGY == "fsdp2":  # sharded first, then its optimizer
            model = fabric.setup_module(plain)
            optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), 1.0))
        else:
            model, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), 1.0))
        clipper = prepare(fabric, model, max_norm=max_norm or HUGE)
        x, y = (t[RANK::WORLD] for t in data(1, ROWS))
        fabric.backward(loss_of(model, x, y))
        if max_norm is None:
            fabric.clip_gradients(model, optimizer, clip_val=0.03)
            optimizer.step()
            now = {n.removeprefix("_forward_module.").removeprefix("module."): p for n, p in whole(model).items()}
            grads, _ = oracle(net(), *data(1, ROWS))
            out[name] = {"off": off(now, before, {n: g.clamp(-0.03, 0.03) for n, g in grads.items()})}
            continue
        norm = fabric.clip_gradients(model, optimizer, max_norm=max_norm)
        optimizer.step()
        now = {n.removeprefix("_forward_module.").removeprefix("module."): p for n, p in whole(model).items()}
        out[name] = found(now, before, max_norm, clipper.last_report) | {"returned": float(norm) == float(clipper.last_report.total_norm)}
    texts = []
    for call in (
        lambda: fabric.clip_gradients(model, optimizer, max_norm=0.5),
        lambda: fabric.clip_gradients(net(), optimizer, max_norm=0.5),
        lambda: fabric.clip_gradients(model, optimizer),
        lambda: prepare(fabric, max_norm=1.0),
    ):
        try:
            call()
        except ValueError as error:
            texts.append(str(error))
    optimizer.zero_grad()
    fabric.backward(loss_of(model, x, y) * math.inf)
    try:
        fabric.clip_gradients(model, optimizer, max_norm=HUGE, error_if_nonfinite=True)
    except RuntimeError as error:
        texts.append(str(error))
    return out | {"texts": texts}


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    cases = {"clip": one_step(0.1), "tiny": one_step(TINY), "huge": one_step(HUGE), "accumulate": one_step(0.1, micro=2)}
    cases |= {"groups": one_step(0.1, steps="groups"), "part": one_step(0.1, steps="part"), "both": both_clip()}
    if STRATEGY != "fsdp2":
        cases |= {"two": two_optimizers(), "resumed": resumed(), "by_parts": by_parts()}
        cases |= {"fp16": in_fp16(0.1), "fp16 fused": in_fp16(0.1, fused=True), "fp16 bad": in_fp16(0.1, factor=math.inf)}
    cases["fabric"] = fabric_steps()
    print("RESULT " + json.dumps(cases), flush=True)
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


main()
