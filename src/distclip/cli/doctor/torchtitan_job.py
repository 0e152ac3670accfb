"""torchtitan's smallest training: its packaged debug model with random tokens. Imported where
torchtitan is installed."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.dataloader import BaseDataLoader  # pyright: ignore[reportMissingImports]
from torchtitan.components.optimizer import default_adamw  # pyright: ignore[reportMissingImports]
from torchtitan.components.tokenizer import BaseTokenizer  # pyright: ignore[reportMissingImports]
from torchtitan.config import (  # pyright: ignore[reportMissingImports]
    ParallelismConfig,
    TrainingConfig,
)
from torchtitan.config.configs import DebugConfig  # pyright: ignore[reportMissingImports]
from torchtitan.models.common.attention import (  # pyright: ignore[reportMissingImports]
    FlexAttention,
    ScaledDotProductAttention,
)
from torchtitan.models.llama3.config_registry import (  # pyright: ignore[reportMissingImports]
    llama3_debugmodel,
)

from distclip.cli.doctor.framework_jobs import LEARNING_RATE, STEPS, integration

VOCABULARY = 256  # of the tokens; the models know more
MAX_NORM = 0.5  # of the job


class RandomTokens(BaseDataLoader):  # pyright: ignore[reportUntypedBaseClass]
    """Each data-parallel rank's own tokens, the same in each run."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):  # pyright: ignore[reportUntypedBaseClass]
        pass

    def __init__(
        self, config: Config, *, dp_rank: int, seq_len: int, local_batch_size: int, **_: Any
    ) -> None:
        self._shape = (local_batch_size, seq_len)
        self._name = f"dp_rank_{dp_rank}"
        self._source = torch.Generator().manual_seed(100 + dp_rank)

    def __iter__(self) -> Generator[tuple[dict[str, Tensor], Tensor]]:
        rows, columns = self._shape
        positions = torch.arange(columns).expand(self._shape).contiguous()
        while True:
            tokens = torch.randint(VOCABULARY, (rows, columns + 1), generator=self._source)
            inputs = {"input": tokens[:, :-1].contiguous(), "positions": positions}
            yield inputs, tokens[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Tensor]:
        return {self._name: self._source.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._source.set_state(state[self._name])


class NoTokenizer(BaseTokenizer):  # pyright: ignore[reportUntypedBaseClass]
    """Where tokens come from no text."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):  # pyright: ignore[reportUntypedBaseClass]
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        pass

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        raise NotImplementedError

    def decode(self, *args: Any, **kwargs: Any) -> str:
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        return VOCABULARY


def shortened(config: Any, folder: str, *, steps: int, max_norm: float) -> Any:
    """A packaged debug model's config with random tokens, short sequences and float32, on what
    every device and torch 2.13 can run. Changes `config`."""
    for _, _, parent, name in list(config.model_spec.model.traverse(FlexAttention.Config)):
        setattr(parent, name, ScaledDotProductAttention.Config())  # is not compiled
    config.dump_folder = folder
    config.tokenizer = NoTokenizer.Config()
    config.dataloader = RandomTokens.Config()
    config.training = TrainingConfig(
        local_batch_size=2, seq_len=16, steps=steps, max_norm=max_norm,
        mixed_precision_param="float32", disable_cuda_graphs=True,
    )  # fmt: skip
    # the other backends ask for a later FSDP2
    config.parallelism = ParallelismConfig(spmd_backend="partial_dtensor")
    config.activation_checkpoint = None
    config.debug = DebugConfig(seed=1, enable_structured_logging=False)
    return config


class StepRecorder:
    """Keeps what a trainer logs of each step, in place of its logger, and the gradients that it
    will clip."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.squares: list[dict[str, float]] = []  # of each step: the sum of a gradient's squares
        self._own_step = trainer.forward_backward_step
        trainer.forward_backward_step = self.forward_backward_step
        trainer.metrics_processor.logger = self

    def forward_backward_step(self, **arguments: Any) -> Any:
        loss = self._own_step(**arguments)
        self.see_gradients()
        return loss

    def see_gradients(self) -> None:
        self.squares.append(squares_by_name(self.trainer))

    @property
    def exact_norms(self) -> list[float]:
        """Of the gradients of this rank's parameters."""
        return [math.sqrt(sum(squares.values())) for squares in self.squares]

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.losses.append(metrics["loss_metrics/global_avg_loss"])
        self.norms.append(metrics["grad_norm"])

    def close(self) -> None:
        pass


def squares_by_name(trainer: Any) -> dict[str, float]:
    """Of the whole gradients of this rank's parameters, in float64. A collective."""
    squares: dict[str, float] = {}
    for part in trainer.model_parts:
        for name, param in part.named_parameters():
            if param.grad is not None:
                grad = param.grad.full_tensor() if isinstance(param.grad, DTensor) else param.grad
                squares[name] = float(grad.cpu().double().square().sum())
    return squares


def train_with_torchtitan(with_distclip: bool) -> StepRecorder:
    with tempfile.TemporaryDirectory() as folder:
        config = shortened(llama3_debugmodel(), folder, steps=STEPS, max_norm=MAX_NORM)
        # Adam divides a clip out again, unless eps is larger than what it divides by
        config.optimizer = default_adamw(lr=LEARNING_RATE, eps=1.0, weight_decay=0.0)
        trainer = config.build()
        if with_distclip:
            integration("torchtitan").clip_with_distclip(trainer)
        recorder = StepRecorder(trainer)
        trainer.train()
        trainer.close()
    return recorder
