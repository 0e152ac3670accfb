"""Stage 3c: one call of the clipper: what was asked, and by what gradients are multiplied before
anything else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distclip.errors import ConfigError
from distclip.optimizers import OptimizerParams
from distclip.torch_internals.dtensor import local_tensor
from distclip.torch_internals.grad_scaler import ScalerState


@dataclass(frozen=True, slots=True)
class Request:
    """Equal on every rank, or the call is refused: `text` travels as a hash in the message."""

    operation: str
    owned: tuple[OptimizerParams, ...]
    hands: ScalerState
    grad_scale: float
    problem: ConfigError | None  # raised on all ranks once they agreed that they made this call
    # a loss scale will be lowered after a bad step: an error only after several
    patient: bool = False
    of: Literal["grad", "param"] = "grad"  # what is measured
    guards: bool = True  # what optimizers step beside what is clipped has to be finite

    @property
    def passive(self) -> bool:
        """Nothing is touched, skipped or counted."""
        return self.operation in ("measure", "audit")

    @property
    def text(self) -> str:
        said = [self.operation if self.of == "grad" else f"{self.operation} of parameters"]
        if self.owned:
            said.append(f"{len(self.owned)} optimizer{'s' if len(self.owned) > 1 else ''}")
        if self.hands.enabled:
            before = [str(i) for i, scaled in enumerate(self.hands.scaled) if not scaled]
            said.append(
                "a scaler"
                + (f" that unscaled optimizer {', '.join(before)} before" if before else "")
            )
        if self.grad_scale != 1:
            said.append(f"grad_scale {self.grad_scale!r}")
        return " with ".join([said[0], ", ".join(said[1:])] if said[1:] else said) + (
            f" [{self.problem}]" if self.problem else ""
        )

    @property
    def inverse(self) -> Tensor | float:
        return 1.0 if self.hands.inverse is None else self.hands.inverse

    def unscaled(self) -> frozenset[int]:
        """Pieces whose gradients the user's own `unscale_` has dealt with."""
        if not self.hands.enabled or all(self.hands.scaled):
            return frozenset()
        return frozenset().union(
            *(
                o.pieces
                for o, scaled in zip(self.owned, self.hands.scaled, strict=True)
                if not scaled
            )
        )

    def others(self) -> list[Tensor]:
        """This rank's gradients, each once, that the optimizers step and the clipper does not clip:
        without a scaler all of them, with one those that still carry the scale."""
        owned = zip(self.owned, self.hands.scaled, strict=True)
        params = (p for o, scaled in owned if scaled or not self.hands.enabled for p in o.unclipped)
        return list(
            {id(p.grad): local_tensor(p.grad) for p in params if p.grad is not None}.values()
        )

    def powers(
        self, pieces: Sequence[int], p: float, device: torch.device
    ) -> Tensor | float | None:
        """What power sums are multiplied by: for all alike, or [pieces] float64; None where that is
        1."""
        if self.hands.inverse is None:
            return None if self.grad_scale == 1 else _power(self.grad_scale, p)
        scaled = _power(self.hands.inverse * self.grad_scale, p)
        before = self.unscaled()
        if not before:
            return scaled
        plain = torch.full_like(scaled, _power(self.grad_scale, p))
        # a mask made here would have to be sent
        return torch.stack([plain if i in before else scaled for i in pieces])

    def scales(self, pieces: Sequence[int], device: torch.device) -> Tensor:
        """[pieces] float64: what unscales each gradient, `grad_scale` included."""
        factor = self.powers(pieces, 1.0, device)
        one = torch.ones(len(pieces), dtype=torch.float64, device=device)
        return one if factor is None else one * factor


def _power(factor: Any, p: float) -> Any:
    """Of a tensor or of a number: what a factor of the gradients does to their power sum, or
    maximum."""
    return factor if math.isinf(p) else factor**p
