"""Runs the migration guide's blocks that need a framework, each in its own setting, and the
README's lines. Prints one JSON line."""

import gc
import json
import re
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import deepspeed
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from docs.blocks import marked
from docs.setting import ROWS, batch, gradients, length, loss_of, net, whole
from parity.oracle import total_norm


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
    zero = {
        "train_batch_size": ROWS,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    yield "deepspeed", model, lambda: {"rest": zero}, lambda n: n["clipper"]
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


def lines_of_the_readme():
    """Each runs after `import distclip` and no other import of distclip's."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    model, inside = net(), net()
    zero = {
        "train_batch_size": ROWS,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    engine, *_ = deepspeed.initialize(
        model=inside, optimizer=torch.optim.SGD(inside.parameters(), 1.0), config=zero
    )
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(), use_cpu=True, report_to=[]
    )
    given = {
        "accelerator": Accelerator(cpu=True),
        "model": model,
        "engine": engine,
        "fabric": Fabric(accelerator="cpu", devices=1),
    }
    given |= {"trainer": transformers.Trainer(WithLoss(), arguments), "Trainer": LightningTrainer}
    found = re.findall(r"`([^`]*distclip\.integrations\.[^`]*\([^`]*)`", readme)
    for line in found:
        exec(f"import distclip\n{line}", dict(given))
    return found


def main():
    torch.set_num_threads(1)
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
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    print("RESULT " + json.dumps({"blocks": out, "lines": lines_of_the_readme()}), flush=True)
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


main()
