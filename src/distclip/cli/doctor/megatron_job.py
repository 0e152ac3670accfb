"""Megatron-Core's smallest training: its DDP and optimizer, and the other jobs' model."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from distclip.cli.doctor.framework_jobs import (
    LEARNING_RATE,
    STEPS,
    TrainedModel,
    in_a_group_alone,
    integration,
    params_of,
    problem,
)


@contextmanager
def around_megatron() -> Generator[None]:
    """A process group of this process alone, and Megatron's over it."""
    from megatron.core import parallel_state

    with in_a_group_alone():  # which ends Megatron's groups too: it only forgets them itself
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()


def train_with_megatron(max_norm: float, with_distclip: bool) -> TrainedModel:
    """In float32, without the distributed optimizer, whose shards one rank does not have."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.transformer_config import TransformerConfig

    model, x, y = problem()
    device = torch.cuda.current_device()
    model, x, y = model.to(device), x.to(device), y.to(device)
    # DDP asks for a transformer's config; its sizes say nothing of this model
    config = TransformerConfig(num_layers=1, hidden_size=2, num_attention_heads=1)
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    optimizer: Any = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="sgd", lr=LEARNING_RATE, sgd_momentum=0.0, weight_decay=0.0,
            clip_grad=0.0 if with_distclip else max_norm,
        ),
        [wrapped],
        use_gloo_process_groups=False,
    )  # fmt: skip
    if with_distclip:
        integration("megatron").attach(optimizer, wrapped, max_norm=max_norm)
    norms: list[float] = []
    for _ in range(STEPS):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        wrapped(x, y)["loss"].backward()
        wrapped.finish_grad_sync()
        _, norm, _ = optimizer.step()
        norms.append(float(norm))
    return TrainedModel(norms, params_of(model))
