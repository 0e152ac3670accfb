"""What stands behind a framework's own clipping methods once distclip has taken their place, as
Accelerate and Fabric have it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from distclip import ClipReport, GradClipper
from distclip.integrations.deferred_scaler_update import DeferredScalerUpdate
from distclip.integrations.set_aside import params_of, set_aside


@dataclass
class PreparedModels:
    """Modules that were prepared by one call, and the norm that later calls must name."""

    modules: tuple[nn.Module, ...]
    max_norm: float | None  # None under a policy
    norm_type: float
    options: dict[str, Any]  # of GradClipper

    def params_by_id(self) -> dict[int, Tensor]:
        return {id(param): param for param in params_of(self.modules)}

    def has_norm(self, max_norm: float | None, norm_type: float) -> bool:
        return max_norm == self.max_norm and norm_type == self.norm_type

    def options_without(self, *names: str) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name not in names}


PreparedT = TypeVar("PreparedT", bound=PreparedModels)
ScopeT = TypeVar("ScopeT", bound="ClippingScope[Any]")


class ClippingScope(Generic[PreparedT]):
    """The models that one framework object clips through distclip."""

    def __init__(self) -> None:
        self.prepared: list[PreparedT] = []
        self.deferred_update: DeferredScalerUpdate | None = None

    @classmethod
    def behind(cls: type[ScopeT], method: Callable[..., Any]) -> ScopeT | None:
        """The scope that `method` is bound to; None while it is the framework's own."""
        owner = getattr(method, "__self__", None)
        return owner if isinstance(owner, cls) else None

    def clip_without(
        self, unclipped: Sequence[Tensor], clipper: GradClipper, optimizers: Any, scaler: Any
    ) -> tuple[ClipReport, bool]:
        """Clip with the gradients of `unclipped` set aside. One all-reduce.

        Returns:
            The report, and whether any of `unclipped` had a gradient.
        """
        deferred = self.deferred_update
        if deferred is None and not unclipped:
            return clipper.clip_(optimizers, scaler), False
        with (
            set_aside(unclipped) as had_grad,
            nullcontext() if deferred is None else deferred.clipping(),
        ):
            return clipper.clip_(optimizers, scaler), bool(had_grad)
