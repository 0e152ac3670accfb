"""The smallest training of each framework whose model one brings oneself, with its own clipping and
with distclip's, and the same steps in float64 without it."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import distclip

STEPS, LEARNING_RATE, ROWS = 5, 0.5, 8


class TrainedModel(NamedTuple):
    """What a job gives: the norm of each step, as it told it (empty where it does not), and its
    model's parameters at the end."""

    norms: list[float]
    params: list[Tensor]


class TinyRegression(nn.Module):
    """Two layers, with their loss: the model of every job."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.net(x) - labels).square().mean()}


def problem() -> tuple[TinyRegression, Tensor, Tensor]:
    """The model, its inputs [ROWS, 6] and its targets [ROWS, 4]; the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TinyRegression(), torch.randn(ROWS, 6) * 4, torch.randn(ROWS, 4)


def train_in_float64(max_norm: float) -> TrainedModel:
    """The same steps by hand."""
    model, x, y = problem()
    model, x, y = model.double(), x.double(), y.double()
    norms: list[float] = []
    for _ in range(STEPS):
        model.zero_grad()
        model(x, y)["loss"].backward()
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        norms.append(math.sqrt(sum(float(grad.square().sum()) for grad in grads)))
        with torch.no_grad():
            for param, grad in zip(model.parameters(), grads, strict=True):
                param -= LEARNING_RATE * min(1.0, max_norm / norms[-1]) * grad
    return TrainedModel(norms, params_of(model))


def integration(name: str) -> Any:
    """ModuleNotFoundError with the extra where the framework is missing."""
    return getattr(distclip.integrations, name)  # pyright: ignore[reportAttributeAccessIssue]


def params_of(model: nn.Module) -> list[Tensor]:
    return [param.detach().cpu().double() for param in model.parameters()]


def train_with_accelerate(max_norm: float, with_distclip: bool) -> TrainedModel:
    from accelerate import Accelerator

    accelerator = Accelerator()
    model, x, y = problem()
    x, y = x.to(accelerator.device), y.to(accelerator.device)
    prepared: Any = accelerator.prepare(model, torch.optim.SGD(model.parameters(), LEARNING_RATE))
    model, optimizer = prepared
    if with_distclip:
        integration("accelerate").prepare(accelerator, model, max_norm=max_norm)
    norms: list[float] = []
    for _ in range(STEPS):
        accelerator.backward(model(x, y)["loss"])
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), max_norm)))  # pyright: ignore[reportArgumentType]
        optimizer.step()
        optimizer.zero_grad()
    accelerator.free_memory()
    return TrainedModel(norms, params_of(model))


def train_with_transformers(max_norm: float, with_distclip: bool) -> TrainedModel:
    from transformers import Trainer, TrainingArguments

    model, x, y = problem()
    rows = [{"x": one, "labels": other} for one, other in zip(x, y, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=ROWS, max_grad_norm=max_norm,
            optim="sgd", learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        if with_distclip:
            integration("transformers").clip_with_distclip(trainer)
        trainer.train()
    logs = trainer.state.log_history
    return TrainedModel(
        [float(log["grad_norm"]) for log in logs if "grad_norm" in log], params_of(model)
    )


def train_with_lightning(max_norm: float, with_distclip: bool) -> TrainedModel:
    from lightning import LightningModule
    from lightning import Trainer as LightningTrainer

    model, x, y = problem()

    class LightningJob(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(*batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), LEARNING_RATE)

    clipping: Any = None
    how: dict[str, Any] = {"gradient_clip_val": max_norm}
    norms: list[float] = []
    if with_distclip:
        clipping = integration("lightning").GradientClipping(
            max_norm=max_norm, sinks=[_NormRecorder(norms)], log=False
        )
        how = {"callbacks": [clipping]}
    trainer = LightningTrainer(
        max_steps=STEPS, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, devices=1, **how,
    )  # fmt: skip
    trainer.fit(LightningJob(), DataLoader(TensorDataset(x, y), ROWS))
    return TrainedModel(norms, params_of(model))


class _NormRecorder:
    """A sink that keeps the norms."""

    def __init__(self, norms: list[float]) -> None:
        self._norms = norms

    def write(self, report: Any) -> None:
        self._norms.append(float(report.total_norm))


@contextmanager
def launched_alone(**more: str) -> Generator[None]:
    """What a launcher sets for a process alone, and `more`. Afterwards the environment is what it
    was, whatever the framework wrote into it, and no process group is left."""
    before = dict(os.environ)
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} | more)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def around_torchtitan() -> AbstractContextManager[None]:
    """It makes the process group itself, at any free port (0)."""
    return launched_alone(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


@contextmanager
def in_a_group_alone() -> Generator[None]:
    """A process group of this process alone."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    with launched_alone():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        yield


@contextmanager
def around_deepspeed() -> Generator[None]:
    import deepspeed

    if not torch.cuda.is_available():
        # its C++ build takes minutes, and gloo does
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with in_a_group_alone():
        yield


def train_with_deepspeed(max_norm: float, with_distclip: bool) -> TrainedModel:
    import deepspeed

    model, x, y = problem()
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": 0.0 if with_distclip else max_norm,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    engine: Any
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), LEARNING_RATE), config=config
    )
    if with_distclip:
        integration("deepspeed").attach(engine, max_norm=max_norm)
    x, y = x.to(engine.device), y.to(engine.device)
    norms: list[float] = []
    for _ in range(STEPS):
        engine.backward(engine(x, y)["loss"])
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    params = params_of(engine.module)
    engine.destroy()
    return TrainedModel(norms, params)
