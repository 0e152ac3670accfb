"""Runs the migration guide's blocks that need a framework, each in its own setting, and the
README's diffs. Prints one JSON line."""

import gc
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from docs.blocks import marked
from docs.readme import batches, sides
from docs.setting import ROWS, batch, gradients, length, loss_of, net, whole
from parity.oracle import total_norm

ZERO = {
    "train_batch_size": ROWS,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
}


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()

    def training_step(self, batch, index):
        return loss_of(self.net)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, labels):
        return {"loss": (self.net(x) - labels).square().mean()}


def settings(model, optimizer):
    """By fixture: the model that moves, what the block finds, where its clipper is afterwards."""
    yield "deepspeed", model, lambda: {"rest": ZERO}, lambda n: n["clipper"]
    yield (
        "accelerate",
        model,
        lambda: {"accelerator": Accelerator(cpu=True)},
        lambda n: n["clipper"],
    )
    yield (
        "fabric",
        model,
        lambda: {"fabric": Fabric(accelerator="cpu", devices=1)},
        lambda n: n["clipper"],
    )
    quiet = {
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    }
    module = Regression()
    found = {
        "module": module,
        "rest": {"accelerator": "cpu", "devices": 1, "max_steps": 1, **quiet},
    }
    found["batches"] = DataLoader(TensorDataset(*batch()), batch_size=ROWS)
    yield "lightning", module, lambda: found, lambda n: n["clipping"].clippers[0]
    arguments = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
    }
    arguments |= {
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": ROWS,
        "save_strategy": "no",
        "report_to": [],
    }
    arguments |= {"disable_tqdm": True, "dataloader_pin_memory": False}
    records = [{"x": x, "labels": y} for x, y in zip(*batch())]
    regression = WithLoss()
    found2 = {"rest": arguments, "records": records, "model": regression}
    callback = lambda n: (  # noqa: E731
        next(c for c in n["trainer"].callback_handler.callbacks if hasattr(c, "clipper")).clipper
    )
    yield "trainer", regression, lambda: found2, callback


def given(name):
    """What the README's diff of this framework finds, and the model whose parameters move."""
    if name == "accelerate":
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        found = {"optimizer": optimizer, "loss_fn": nn.functional.mse_loss, "data": batches()}
        return found | {"model": model}, model
    if name == "deepspeed":
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        found = {"optimizer": optimizer, "loss_fn": nn.functional.mse_loss, "data": batches()}
        return found | {"model": model, "config": dict(ZERO)}, model
    if name == "lightning":
        model = Regression()
        data = DataLoader(TensorDataset(*batch()), batch_size=ROWS)
        return {"module": model, "data": data}, model
    model = WithLoss()
    rows = [{"x": x, "labels": y} for xs, ys in batches() for x, y in zip(xs, ys)]
    return {"model": model, "dataset": rows}, model


def diffs_of_the_readme():
    """By framework: how far both sides of its diff moved the parameters, how far they differ, and
    how much the clip changes, relative to the way."""
    out = {}
    for name in ("accelerate", "trainer", "lightning", "deepspeed"):
        ways = []
        for code in sides(name):
            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()
            found, model = given(name)
            before = whole(model.parameters())
            exec(compile(code, f"README.md, {name}", "exec"), found)
            after = whole(model.parameters())
            ways.append(torch.cat([(b - a).flatten() for b, a in zip(before, after)]))
        old, new, free = ways
        way = float(old.norm())
        out[name] = {"way": way, "apart": float((old - new).norm()) / way}
        out[name]["clip"] = float((old - free).norm()) / way
    return out


def main():
    torch.set_num_threads(1)
    gc.freeze()  # no collection, and no search for objects, goes through what was imported
    warnings.simplefilter("ignore")
    # its C++ build takes minutes, and gloo does
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    assert "distclip.integrations" not in sys.modules, (
        "vacuous: the blocks are to find it by themselves"
    )
    page = {block.fixture: block for block in marked("migrating.md", "runs in a framework: ")}
    out = {}
    for name in page:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        _, moving, make, clipper_of = next(
            setting for setting in settings(model, optimizer) if setting[0] == name
        )
        names = {"model": model, "optimizer": optimizer, "loss_of": loss_of} | make()
        before = whole(moving.parameters())
        page[name].run(names)
        report = clipper_of(names).last_report
        out[name] = {
            "norm": float(report.total_norm),
            "wanted": total_norm(gradients().values()),
            "length": length(before, whole(moving.parameters())),
        }
    os.chdir(tempfile.mkdtemp())  # frameworks write beside the script
    print("RESULT " + json.dumps({"blocks": out, "diffs": diffs_of_the_readme()}), flush=True)
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


main()
