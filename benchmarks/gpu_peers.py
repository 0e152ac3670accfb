"""What distclip is compared with on a CUDA device: torch's own ways, and other projects' norms
where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

TORCH, RECIPE = (
    "torch clip_grad_norm_(foreach=True)",
    "torch get_total_norm + clip_grads_with_norm_",
)
AUTOMODEL, ENGINE = (
    "NeMo Automodel's norm + torch's scale",
    "Transformer Engine's norm + torch's scale",
)
Clip = Callable[[list[nn.Parameter], float], Any]


def gradients(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def _torch(params: list[nn.Parameter], max_norm: float) -> None:
    clip_grad_norm_(params, max_norm, foreach=True)


def _recipe(params: list[nn.Parameter], max_norm: float) -> None:
    clip_grads_with_norm_(
        params, max_norm, get_total_norm(gradients(params), foreach=True), foreach=True
    )


def _automodel() -> Clip:
    sumsq = import_module("nemo_automodel.components.training.triton.grad_norm").multi_tensor_sumsq
    return lambda params, max_norm: clip_grads_with_norm_(
        params, max_norm, sumsq(gradients(params)).sqrt().float(), foreach=True
    )


def _engine() -> Clip:
    apply = import_module("transformer_engine.pytorch.optimizers").multi_tensor_applier
    norm = import_module("transformer_engine_torch").multi_tensor_l2norm

    def clip(params: list[nn.Parameter], max_norm: float) -> None:
        unused = torch.zeros(1, dtype=torch.int32, device="cuda")
        total, _ = apply(norm, unused, [gradients(params)], False)
        clip_grads_with_norm_(params, max_norm, total, foreach=True)

    return clip


def peers() -> tuple[dict[str, Clip], list[str]]:
    """Those that are there, and why the others are not."""
    found: dict[str, Clip] = {TORCH: _torch, RECIPE: _recipe}
    missing: list[str] = []
    for name, make in ((AUTOMODEL, _automodel), (ENGINE, _engine)):
        try:
            found[name] = make()
        except (ImportError, AttributeError, OSError) as error:
            missing.append(f"{name}: not measured ({type(error).__name__}: {error})")
    return found, missing


def per_parameter(params: list[nn.Parameter], max_norm: float) -> None:
    """A threshold for each tensor, as torch's list operations have it."""
    grads = gradients(params)
    coefs = (max_norm / (torch.stack(torch._foreach_norm(grads)) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, list(coefs.unbind()))
