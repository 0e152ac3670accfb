"""`distclip doctor --framework NAME`: the smallest training of that framework, with its own
clipping and with distclip's, beside the same steps in float64 without it."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import distclip
from distclip.cli.doctor.output import DoctorOutput, as_json, as_table
from distclip.cli.doctor.records import CheckResult

STEPS, LEARNING_RATE, ROWS = 5, 0.5, 8
# of a norm in float32, and of weights after the steps, relative to how far they moved: torch's own
# norm is off by 1e-4 on a CPU
NORM_BOUND, WEIGHT_BOUND, OWN_BOUND = 1e-5, 1e-5, 1e-3


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


def _problem() -> tuple[TinyRegression, Tensor, Tensor]:
    """The model, its inputs [ROWS, 6] and its targets [ROWS, 4]; the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TinyRegression(), torch.randn(ROWS, 6) * 4, torch.randn(ROWS, 4)


def _in_float64(max_norm: float) -> TrainedModel:
    """The same steps by hand."""
    model, x, y = _problem()
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
    return TrainedModel(norms, _params(model))


def _integration(name: str) -> Any:
    """ModuleNotFoundError with the extra where the framework is missing."""
    return getattr(distclip.integrations, name)  # pyright: ignore[reportAttributeAccessIssue]


def _params(model: nn.Module) -> list[Tensor]:
    return [param.detach().cpu().double() for param in model.parameters()]


def _accelerate(max_norm: float, with_distclip: bool) -> TrainedModel:
    from accelerate import Accelerator

    accelerator = Accelerator()
    model, x, y = _problem()
    x, y = x.to(accelerator.device), y.to(accelerator.device)
    prepared: Any = accelerator.prepare(model, torch.optim.SGD(model.parameters(), LEARNING_RATE))
    model, optimizer = prepared
    if with_distclip:
        _integration("accelerate").prepare(accelerator, model, max_norm=max_norm)
    norms: list[float] = []
    for _ in range(STEPS):
        accelerator.backward(model(x, y)["loss"])
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), max_norm)))  # pyright: ignore[reportArgumentType]
        optimizer.step()
        optimizer.zero_grad()
    accelerator.free_memory()
    return TrainedModel(norms, _params(model))


def _transformers(max_norm: float, with_distclip: bool) -> TrainedModel:
    from transformers import Trainer, TrainingArguments

    model, x, y = _problem()
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
            _integration("transformers").clip_with_distclip(trainer)
        trainer.train()
    logs = trainer.state.log_history
    return TrainedModel(
        [float(log["grad_norm"]) for log in logs if "grad_norm" in log], _params(model)
    )


def _lightning(max_norm: float, with_distclip: bool) -> TrainedModel:
    from lightning import LightningModule
    from lightning import Trainer as LightningTrainer

    model, x, y = _problem()

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
        clipping = _integration("lightning").GradientClipping(
            max_norm=max_norm, sinks=[_NormRecorder(norms)], log=False
        )
        how = {"callbacks": [clipping]}
    trainer = LightningTrainer(
        max_steps=STEPS, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, devices=1, **how,
    )  # fmt: skip
    trainer.fit(LightningJob(), DataLoader(TensorDataset(x, y), ROWS))
    return TrainedModel(norms, _params(model))


class _NormRecorder:
    """A sink that keeps the norms."""

    def __init__(self, norms: list[float]) -> None:
        self._norms = norms

    def write(self, report: Any) -> None:
        self._norms.append(float(report.total_norm))


JOBS: dict[str, Callable[[float, bool], TrainedModel]] = {
    "accelerate": _accelerate,
    "lightning": _lightning,
    "transformers": _transformers,
}


def run(options: argparse.Namespace) -> int:
    """In one process; the exit code of the table."""
    name: str = options.framework
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print("distclip doctor --framework: run it without torchrun", file=sys.stderr)
        return 2
    findings = DoctorOutput()
    try:
        findings.results = _compared(name)
    except (ModuleNotFoundError, PackageNotFoundError) as error:
        findings.stopped = str(error)
    except Exception as error:
        traceback.print_exc()
        findings.stopped = f"{name}: {type(error).__name__}: {error}"
    print(as_json(findings) if options.json else as_table(findings), flush=True)
    return findings.exit_code


def _compared(name: str) -> list[CheckResult]:
    _integration(name)
    max_norm = 0.5 * _in_float64(math.inf).norms[0]
    exact = _in_float64(max_norm)
    # warnings and lines of the framework itself; standard output is for the results
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            own, ours = (JOBS[name](max_norm, with_distclip) for with_distclip in (False, True))
        finally:
            logging.disable(logging.NOTSET)
    seen = f"{name} {version(name)}, {STEPS} steps"
    if len(ours.norms) != STEPS:
        text = f"{seen}: {len(ours.norms)} norms were told"
        return [CheckResult("norm", "fail", text, _REMEDY.format(name))]
    norm = max(abs(a / b - 1) for a, b in zip(ours.norms, exact.norms, strict=True))
    weights, own_weights = _moved_apart(ours, exact), _moved_apart(own, exact)
    return [
        _result(
            "norm",
            norm <= NORM_BOUND,
            f"{seen}: distclip's norms differ by {norm:.0e} from float64",
            name,
        ),
        _result(
            "weights",
            weights <= WEIGHT_BOUND,
            f"their change differs by {weights:.0e} from float64",
            name,
        ),
        _result(
            "own",
            own_weights <= OWN_BOUND,
            f"with {name}'s own clipping by {own_weights:.0e}",
            name,
        ),
    ]


_REMEDY = (
    "run it again with --json, and report both its output and the versions; the versions that were "
    "run with {} stand in docs/compatibility.md"
)


def _result(check: str, good: bool, seen: str, name: str) -> CheckResult:
    return CheckResult(
        check, "pass" if good else "fail", seen, "" if good else _REMEDY.format(name)
    )


def _moved_apart(trained: TrainedModel, exact: TrainedModel) -> float:
    """The difference between two ends, relative to the way from the start."""
    start = _params(_problem()[0])
    apart = sum(
        float((a - b).square().sum()) for a, b in zip(trained.params, exact.params, strict=True)
    )
    way = sum(float((a - b).square().sum()) for a, b in zip(start, exact.params, strict=True))
    return math.sqrt(apart / way)
