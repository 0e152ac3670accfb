"""A LightningModule with distclip's callback, and a Fabric loop: torchrun ... lightning_loop.py
STRATEGY. One JSON line a rank."""

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
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, BatchSizeFinder, LearningRateFinder
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.tuner import Tuner
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
            "groups": lambda: [
                {"params": self.net[0].parameters()},
                {"params": self.net[2].parameters(), "weight_decay": 0.0},
            ],
            "part": lambda: list(self.net[2].parameters()),
        }[self.steps]()
        return torch.optim.SGD(params, 1.0, fused=self.fused)


class ClipsToo(Regression):
    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ):
        self.clip_gradients(optimizer, gradient_clip_val=0.5)


class Searched(Regression):
    """What its steps were taken with."""

    def __init__(self, factor=20.0):
        super().__init__(factor=factor)
        self.lr, self.batch_size, self.stepped = 0.01, ROWS // WORLD, []

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.lr)
        norm = lambda: float(  # noqa: E731
            torch.stack([p.grad.double().norm() for p in self.parameters()]).norm()
        )
        optimizer.register_step_post_hook(lambda *_: self.stepped.append(norm()))
        return optimizer

    def train_dataloader(self):
        return DataLoader(loader().dataset, batch_size=self.batch_size)


class InsideTheFit(LearningRateFinder):
    """Searches when the second epoch begins."""

    def on_fit_start(self, *args):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


class Counting:
    """A sink."""

    def __init__(self):
        self.reports = 0

    def write(self, report):
        self.reports += 1


class ClipsByHand(Regression):
    """`self.clip_gradients` left in."""

    def __init__(self, where):
        super().__init__()
        self.where, self.automatic_optimization = where, where != "training_step"

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        if self.where == "training_step":
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.25, gradient_clip_algorithm="value")
            optimizer.step()
        return loss

    def on_before_optimizer_step(self, optimizer):
        if self.where == "on_before_optimizer_step":
            self.clip_gradients(optimizer, gradient_clip_val=0.5)


class Unfreezing(BaseFinetuning):
    """The first layer begins to train at the third step, its bias alone is given to the optimizer:
    nobody steps its weight."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 2:
            for p in pl_module.net[0].parameters():
                p.requires_grad_(True)
            optimizer.add_param_group({"params": [pl_module.net[0].bias]})


class FineTuned(Regression):
    """Notes the norm of all gradients that are there, and of those that its optimizer holds, in
    float64."""

    def __init__(self):
        super().__init__()
        self.norms = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[2].parameters(), 1e-3)

    def on_after_backward(self):
        held = [p for group in self.optimizers().param_groups for p in group["params"]]
        norm = lambda params: float(  # noqa: E731
            torch.stack([p.grad.double().norm() for p in params if p.grad is not None]).norm()
        )
        self.norms.append([norm(held), norm(self.parameters())])


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
        return (DDPStrategy if kind == "trainer" else FabricDDP)(
            process_group_backend="gloo", find_unused_parameters=True
        )
    sizes = {
        "data_parallel_size": WORLD,
        "tensor_parallel_size": 1,
        "process_group_backend": "gloo",
    }
    return (
        ModelParallelStrategy(**sizes)
        if kind == "trainer"
        else FabricModelParallel(parallelize_fn=shards, **sizes)
    )


def trainer(*callbacks, **more):
    return Trainer(
        accelerator="cpu", devices=WORLD, strategy=strategy("trainer"), callbacks=list(callbacks), logger=False, max_epochs=-1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, **more,
    )  # fmt: skip


def loader(micro=1):
    x, y = (t[RANK::WORLD] for t in data(1, ROWS))
    return DataLoader(TensorDataset(x, y), batch_size=ROWS // WORLD // micro)


def one_step(max_norm, micro=1, steps="all"):
    module, callback = Regression(steps), GradientClipping(max_norm=max_norm)
    before = {
        n.removeprefix("net."): p.detach().double().clone() for n, p in module.named_parameters()
    }
    run = trainer(callback, max_steps=1, accumulate_grad_batches=micro)
    run.fit(module, loader(micro))
    now = {n.removeprefix("net."): p for n, p in whole(module).items()}
    logged = {key: float(value) for key, value in run.logged_metrics.items()}
    return found(
        now, before, max_norm, callback.clippers[0].last_report, "2." if steps == "part" else ""
    ) | {"logged": logged}


def found(now, before, max_norm, report, part=""):
    grads, norm = oracle(net(), *data(1, ROWS), lambda n: n.startswith(part))
    now, before, grads = (
        {n: t for n, t in all.items() if n.startswith(part)} for all in (now, before, grads)
    )
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
        select = lambda all, p=part + ".": {  # noqa: E731
            n.removeprefix(p): t for n, t in all.items() if n.startswith(p)
        }
        out[part] = {"off": off(select(now), select(before), wanted), "norm": float(norm)}
    return out


def in_fp16(max_norm, factor=1.0, fused=False):
    """Lightning takes bf16 for 16-mixed on a CPU; given as a plugin, fp16 and its scaler run there
    as on a GPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    module, callback = Regression(fused=fused, factor=factor), GradientClipping(max_norm=max_norm)
    before = {
        n.removeprefix("net."): p.detach().double().clone() for n, p in module.named_parameters()
    }
    trainer(callback, max_steps=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]).fit(
        module, loader()
    )
    now = {n.removeprefix("net."): p for n, p in whole(module).items()}
    return found(now, before, max_norm, callback.clippers[0].last_report) | {
        "scale": scaler.get_scale()
    }


def both_clip():
    texts = []
    mine = lambda: GradientClipping(max_norm=1.0)  # noqa: E731
    for module, callbacks, more in (
        (Regression(), [mine()], {"gradient_clip_val": 0.5}),
        (ClipsToo(), [mine()], {}),
        (ClipsByHand("training_step"), [mine()], {}),
        (ClipsByHand("on_before_optimizer_step"), [mine()], {}),
        (Regression(), [mine(), type("Mine", (GradientClipping,), {})(max_norm=1.0)], {}),
    ):
        try:
            trainer(*callbacks, max_steps=1, **more).fit(module, loader())
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
    trainer(second, max_steps=3).fit(
        Regression(), loader(), ckpt_path=f"{folder[0]}/a.ckpt", weights_only=False
    )
    return {
        "before": int(first.clippers[0].state_dict()["step"]),
        "after": int(second.clippers[0].state_dict()["step"]),
    }


def searches():
    """Clipped as Lightning clips them by itself; the fit's own clipper stays as it was."""
    out, folder = {}, [tempfile.mkdtemp()]
    if WORLD > 1:
        dist.broadcast_object_list(folder)
    more = {"default_root_dir": folder[0]}
    settings = {
        "num_training": 6,
        "min_lr": 1e-4,
        "max_lr": 1e-2,
        "early_stop_threshold": None,
        "update_attr": False,
    }

    def lr_find(run, module):
        Tuner(run).lr_find(module, loader(), **settings)

    def scale_batch_size(run, module):
        Tuner(run).scale_batch_size(module, steps_per_trial=2, max_trials=2, init_val=2)

    # Lightning scales batches in one process alone
    for search in (lr_find, scale_batch_size) if WORLD == 1 else (lr_find,):
        for name, how in {
            "lightning": {"gradient_clip_val": 0.5},
            "distclip": {},
            "neither": {},
        }.items():
            module = Searched()
            search(
                trainer(
                    *([GradientClipping(max_norm=0.5)] if name == "distclip" else []),
                    max_steps=20,
                    **how,
                    **more,
                ),
                module,
            )
            out.setdefault(search.__name__, {})[name] = module.stepped
    settings["num_training_steps"] = settings.pop("num_training")
    finders = {
        "none": None,
        "at its start": LearningRateFinder(**settings),
        "inside": InsideTheFit(**settings),
    }
    if WORLD == 1:
        finders["after a search of batch sizes"] = LearningRateFinder(**settings)
    for name, finder in finders.items():
        sink = Counting()
        callback, module = (
            GradientClipping(policy=distclip.AutoClip(percentile=50, window=8), sinks=[sink]),
            Searched(),
        )
        callbacks = [callback] if finder is None else [finder, callback]
        if "batch" in name:
            callbacks = [
                BatchSizeFinder(steps_per_trial=1, max_trials=1, init_val=ROWS // WORLD),
                *callbacks,
            ]
        run = trainer(*callbacks, max_steps=3, **more)
        run.fit(module)
        run.save_checkpoint(f"{folder[0]}/{name.replace(' ', '-')}.ckpt")
        state = callback.clippers[0].state_dict()
        out[name] = {
            "state": numbers(state),
            "sink": sink.reports if RANK == 0 else 3,
            "steps": len(module.stepped),
        }
    for name, finder in {"none": [], "with a finder": [LearningRateFinder(**settings)]}.items():
        callback = GradientClipping(policy=distclip.AutoClip(percentile=50, window=8))
        trainer(*finder, callback, max_steps=5, **more).fit(
            Searched(), ckpt_path=f"{folder[0]}/none.ckpt", weights_only=False
        )
        out[f"resumed {name}"] = numbers(callback.clippers[0].state_dict())
    return out


def numbers(state):
    """Counters and thresholds, without the 500 flags of the clip rate."""
    return {
        name: t.tolist()
        for name, t in state.items()
        if isinstance(t, torch.Tensor) and t.numel() < 100
    }


def fine_tuning():
    module, callback, told = FineTuned(), GradientClipping(max_norm=0.1), []

    class Listening(Callback):
        def on_before_zero_grad(self, *_):
            if callback.clippers and callback.clippers[0].last_report is not None:
                told.append(float(callback.clippers[0].last_report.total_norm))

    trainer(Unfreezing(), callback, Listening(), max_steps=6).fit(module, loader())
    told.append(float(callback.clippers[0].last_report.total_norm))
    return {
        "held": [a for a, _ in module.norms],
        "all": [b for _, b in module.norms],
        "told": told[-6:],
    }


def fits_twice():
    """With one callback, and a third time without it; the precision plugin is Lightning's own
    again."""
    callback, seen = GradientClipping(max_norm=0.1), []
    run = trainer(callback, max_steps=1)
    for steps in (1, 2, 3):
        module = Regression()
        before = whole(module)
        if steps == 3:
            run.callbacks.remove(callback)
        run.fit_loop.epoch_loop.max_steps = steps
        run.fit(module, loader())
        length = math.sqrt(
            sum(float((p - before[n]).square().sum()) for n, p in whole(module).items())
        )
        seen.append(
            [length, callback.clippers[0].last_report.step, sorted(vars(run.precision_plugin))]
        )
    return {"seen": seen, "norm": float(oracle(net(), *data(1, ROWS))[1])}


def by_parts():
    """Two optimizers of one module under fp16: each part by its own norm, each unscaled once, one
    update of the scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    precision = FabricMixedPrecision("16-mixed", "cpu", scaler)
    fabric = Fabric(
        accelerator="cpu", devices=WORLD, strategy=strategy("fabric"), plugins=[precision]
    )
    fabric.launch()
    plain = net()
    before = whole(plain)
    model, *optimizers = fabric.setup(
        plain, *(torch.optim.SGD(part.parameters(), 1.0) for part in (plain[0], plain[2]))
    )
    prepare(fabric, model, max_norm=0.1)
    x, y = (t[RANK::WORLD] for t in data(1, ROWS))
    fabric.backward(loss_of(model, x, y))
    norms = [
        float(fabric.clip_gradients(model, optimizer, max_norm=0.1)) for optimizer in optimizers
    ]
    for optimizer in optimizers:
        optimizer.step()
    now = {
        n.removeprefix("_forward_module.").removeprefix("module."): p
        for n, p in whole(model).items()
    }
    out = {"scale": scaler.get_scale()}
    for part, seen in zip(("0.", "2."), norms):
        grads, norm = oracle(net(), *data(1, ROWS), lambda n, part=part: n.startswith(part))
        wanted = clipped({n: g for n, g in grads.items() if n.startswith(part)}, norm, 0.1)
        select = lambda all, part=part: {n: t for n, t in all.items() if n.startswith(part)}  # noqa: E731
        out[part] = {
            "off": off(select(now), select(before), wanted),
            "norm": float(norm),
            "norm_off": abs(seen / float(norm) - 1),
        }
    return out


def fabric_holds():
    """Exactly what the optimizer holds at each call, whatever else has a gradient."""
    fabric = Fabric(accelerator="cpu", devices=WORLD, strategy=strategy("fabric"))
    fabric.launch()
    plain, seen = net(), []
    first, second = plain[0], plain[2]
    model, optimizer = fabric.setup(plain, torch.optim.SGD(second.parameters(), 1e-6))
    clipper = prepare(fabric, model, policy=distclip.FixedNorm(0.1))
    x, y = (t[RANK::WORLD] for t in data(1, ROWS))
    grads, _ = oracle(net(), *data(1, ROWS))
    exact = lambda *names: math.sqrt(sum(float(grads[n].square().sum()) for n in names))  # noqa: E731
    held = ["2.weight", "2.bias"]
    for turn in range(3):
        optimizer.zero_grad()  # the first layer's gradients are summed up
        fabric.backward(loss_of(model, x, y))
        told = fabric.clip_gradients(model, optimizer, max_norm=0.1)
        seen.append([exact(*held), float(told)])
        optimizer.step()
        if turn == 1:
            first.bias.grad = None
            optimizer.add_param_group({"params": [first.bias]})
            held.append("0.bias")
    texts = []
    strange = fabric.setup_optimizers(
        torch.optim.SGD([*second.parameters(), torch.nn.Parameter(torch.ones(2))], 1.0)
    )
    other = fabric.setup_optimizers(torch.optim.SGD([first.weight], 1.0))
    for optimizer in (strange, other):
        try:
            fabric.clip_gradients(model, optimizer, max_norm=0.1)
        except ValueError as error:
            texts.append(str(error))
    again = prepare(fabric, model, max_norm=0.1)
    fabric.clip_gradients(model.module, other, max_norm=0.1)
    return {
        "seen": seen,
        "texts": texts,
        "calls": [clipper.last_report.step, again.last_report.step],
    }


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
            now = {
                n.removeprefix("_forward_module.").removeprefix("module."): p
                for n, p in whole(model).items()
            }
            grads, _ = oracle(net(), *data(1, ROWS))
            out[name] = {
                "off": off(now, before, {n: g.clamp(-0.03, 0.03) for n, g in grads.items()})
            }
            continue
        norm = fabric.clip_gradients(model, optimizer, max_norm=max_norm)
        optimizer.step()
        now = {
            n.removeprefix("_forward_module.").removeprefix("module."): p
            for n, p in whole(model).items()
        }
        out[name] = found(now, before, max_norm, clipper.last_report) | {
            "returned": float(norm) == float(clipper.last_report.total_norm)
        }
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
    gc.freeze()  # no collection, and no search for objects, goes through what was imported
    warnings.simplefilter("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    cases = {
        "clip": one_step(0.1),
        "tiny": one_step(TINY),
        "huge": one_step(HUGE),
        "accumulate": one_step(0.1, micro=2),
    }
    cases |= {
        "groups": one_step(0.1, steps="groups"),
        "part": one_step(0.1, steps="part"),
        "both": both_clip(),
    }
    if STRATEGY != "fsdp2":
        cases |= {"searches": searches(), "fits": fits_twice(), "fabric_holds": fabric_holds()}
        cases |= {"two": two_optimizers(), "resumed": resumed(), "by_parts": by_parts()}
        cases |= {
            "fp16": in_fp16(0.1),
            "fp16 fused": in_fp16(0.1, fused=True),
            "fp16 bad": in_fp16(0.1, factor=math.inf),
        }
    if STRATEGY == "single":  # DDP does not reduce what is unfrozen after it was built
        cases["fine_tuning"] = fine_tuning()
    cases["fabric"] = fabric_steps()
    print("RESULT " + json.dumps(cases), flush=True)
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


main()
