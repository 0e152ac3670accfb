"""Unscale first: the handshake with GradScaler. What torch keeps of each optimizer is read and written in this file alone.

A scaler knows for each optimizer whether its gradients were unscaled and whether one was not finite. Both are taken over here: the
inverse scale becomes a factor of the clip's own multiply, and what the scaler is told is the overflow that all ranks agreed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from distclip.errors import ConfigError


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer that a wrapper (Accelerate's, Lightning's) steps: a scaler knows it by its identity."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


class Handshake:
    """What one call has to do with a scaler, or with none.

    Args:
        scaler: a `torch.amp.GradScaler` or `ShardedGradScaler`; None or a disabled one has nothing to say.
        optimizers: innermost ones.
        device: where gradients are measured.

    Raises:
        ConfigError: the scaler is of another kind, has scaled no loss yet, or has stepped an optimizer since its update.
    """

    def __init__(self, scaler: Any, optimizers: Sequence[Optimizer], device: torch.device) -> None:
        self.optimizers = tuple(optimizers)
        self.enabled = scaler is not None and bool(scaler.is_enabled())
        self._records: list[dict[str, Any]] = []
        self._found: list[tuple[Tensor, ...]] = []
        self.inverse: Tensor | None = None  # [] float64, on `device`
        self.scaled = [False] * len(self.optimizers)  # whose gradients still carry the scale
        if scaler is None or not self.enabled:
            return
        if not self.optimizers:
            raise ConfigError("scaler= needs the optimizer too: a scaler keeps its records by optimizer; use clip_(optimizer, scaler)")
        try:
            lost = scaler._scale is None
            self._records = [scaler._per_optimizer_states[id(optimizer)] for optimizer in self.optimizers]
            stages = [record["stage"] for record in self._records]
            self._found = [tuple(record["found_inf_per_device"].values()) for record in self._records]
        except (AttributeError, KeyError, TypeError) as error:
            raise ConfigError(
                f"scaler is a {type(scaler).__name__} that keeps its records in a way unknown to distclip ({error!r}); "
                "pass a torch.amp.GradScaler or ShardedGradScaler of a torch that distclip names as supported"
            ) from error
        if lost:
            raise ConfigError("this scaler has not scaled a loss yet; call scaler.scale(loss).backward() before clipping")
        if OptState.STEPPED in stages:
            raise ConfigError("scaler.step() was already called for this optimizer since scaler.update(); clip before it")
        self.scaled = [stage is OptState.READY for stage in stages]
        # on the scale's own device: scale() copies it to another without waiting, and the host would read it before it is there
        one = torch.ones((), dtype=torch.float32, device=scaler._scale.device)
        self.inverse = scaler.scale(one).double().reciprocal().to(device)

    def found(self, device: torch.device) -> Tensor:
        """[] float64: above 0 where the user's own `unscale_` met inf or NaN on this rank, in whichever parameter."""
        found = torch.zeros((), dtype=torch.float64, device=device)
        for values in self._found:  # still empty where nothing was unscaled yet
            for value in values:
                found = torch.maximum(found, value.to(device, torch.float64).reshape(()))
        return found

    def tell(self, bad: Tensor, stepped: bool) -> None:
        """Record for every optimizer what all ranks agreed on, so that scalers stay equal. Sends nothing, reads nothing on the host.

        Args:
            bad: [] bool or float, above 0 where the step is not to be taken.
            stepped: whether the optimizers were stepped (or skipped) already; else the user's `scaler.step` does it.
        """
        for record in self._records:
            record["found_inf_per_device"] = {bad.device: bad.to(torch.float32, copy=True)}
            record["stage"] = OptState.STEPPED if stepped else OptState.UNSCALED
