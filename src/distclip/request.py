"""One call of the clipper: what was asked, whether it can be honoured, and by what gradients are
multiplied before anything else."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from distclip.errors import ConfigError
from distclip.kernels.tensor_list import TensorList
from distclip.optimizers import (
    OptimizerIndex,
    OptimizerParams,
    check_optimizers,
    check_step_signatures,
)
from distclip.p_norm import PNorm
from distclip.passed import as_number, check_flag, is_text
from distclip.records import ParamPiece
from distclip.torch_internals.dtensor import local_tensor
from distclip.torch_internals.grad_scaler import NO_SCALER, ScalerState
from distclip.values import Column, Number


@dataclass(eq=False)  # not frozen: each call may make one, which would take it twice the time
class Request:
    """Equal on every rank but for the note, or the call is refused: `description` travels as a hash
    in the message. Not written to once it is made.

    Attributes:
        read_only: nothing is touched, skipped or counted.
        leaves_grads: all factors are 1.
        description: what this rank called, in words.
    """

    operation: str
    optimizers: tuple[OptimizerParams, ...] = ()
    scaler: ScalerState = NO_SCALER
    grad_scale: float = 1.0
    # raised on all ranks once they agreed that they made this call
    error: ConfigError | None = None
    # a loss scale will be lowered after a bad step: an error only after several
    tolerate_backoff: bool = False
    target: Literal["grad", "param"] = "grad"  # what is measured
    note: str | None = None  # this rank's, as JSON in ASCII
    # what optimizers step beside what is clipped has to be finite
    guards_unmanaged: bool = True
    # the host learns of a bad step at the next call, since every optimizer of this one folds
    judged_late: bool = False
    # some optimizer steps parameters that are not clipped, or none that are
    steps_others: bool = True
    # RankNorms has seen no reduction since the last step: there are no norms of ranks
    reduced_nothing: bool = False
    read_only: bool = field(init=False)
    leaves_grads: bool = field(init=False)
    description: str = field(init=False)

    def __post_init__(self) -> None:
        self.read_only = self.operation in ("measure", "audit")
        self.leaves_grads = not self.scaler.enabled and self.grad_scale == 1
        self.description = self._describe()

    def _describe(self) -> str:
        what = self.operation if self.target == "grad" else f"{self.operation} of parameters"
        details: list[str] = []
        if self.optimizers:
            count = len(self.optimizers)
            # with the remedy: this text is what ranks show that did not do the same
            folds = " (all fold; fold='never' if not on every rank)" if self.judged_late else ""
            details.append(f"{count} optimizer{'s' if count > 1 else ''}{folds}")
        if self.scaler.enabled:
            before = [str(i) for i, scaled in enumerate(self.scaler.is_scaled) if not scaled]
            unscaled = f" that unscaled optimizer {', '.join(before)} before" if before else ""
            details.append(f"a scaler{unscaled}")
        if self.grad_scale != 1:
            details.append(f"grad_scale {self.grad_scale!r}")
        text = f"{what} with {', '.join(details)}" if details else what
        if self.reduced_nothing:
            text += ", no gradient reduced before it (RankNorms)"
        return f"{text} [{self.error}]" if self.error else text

    @cached_property
    def _unscaled_pieces(self) -> frozenset[int]:
        """Whose gradients the user's own `unscale_` has dealt with."""
        if not self.scaler.enabled or all(self.scaler.is_scaled):
            return frozenset()
        owned = zip(self.optimizers, self.scaler.is_scaled, strict=True)
        return frozenset().union(*(o.pieces for o, scaled in owned if not scaled))

    def factor(self, scaled: bool = True) -> Number:
        """What unscales a gradient that still carries the loss scale, or one that does not;
        `grad_scale` included."""
        inv_scale = self.scaler.inv_scale
        if inv_scale is None or not scaled:
            return self.grad_scale
        return inv_scale if self.grad_scale == 1 else inv_scale * self.grad_scale

    @cached_property
    def common_factor(self) -> Number | None:
        """The factor of all gradients; None where they differ."""
        if not self.scaler.enabled:
            return self.grad_scale
        return None if self._unscaled_pieces else self.factor()

    def grad_factors(self, pieces: Sequence[int]) -> Column:
        """[pieces]: of each gradient."""
        factor, unscaled = self.factor(), self._unscaled_pieces
        if isinstance(factor, Tensor):
            if not unscaled:
                return factor.expand(len(pieces))
            plain = torch.full_like(factor, self.grad_scale)
            # put side by side there: a mask made here would have to be sent
            return torch.stack([plain if i in unscaled else factor for i in pieces])
        return [self.grad_scale if i in unscaled else factor for i in pieces]

    def power_factors(self, pieces: Sequence[int], norm: PNorm) -> Number | Column | None:
        """What power sums are multiplied by: all, or each; None where that is 1."""
        common = self.common_factor
        if self.leaves_grads:
            return None
        if common is None:
            factors = self.grad_factors(pieces)
            if isinstance(factors, Tensor):
                return norm.power_of(factors)
            return [norm.power_of(factor) for factor in factors]
        return norm.power_of(common)

    def unmanaged_grads(self) -> list[Tensor]:
        """This rank's gradients, each once, that the optimizers step and the clipper does not clip:
        without a scaler all of them, with one those that still carry the scale."""
        owned = zip(self.optimizers, self.scaler.is_scaled, strict=True)
        params = (
            param
            for o, scaled in owned
            if scaled or not self.scaler.enabled
            for param in o.unclipped_params
        )
        return list(
            {id(p.grad): local_tensor(p.grad) for p in params if p.grad is not None}.values()
        )

    def found_inf(self, device: torch.device, on_host: bool) -> Number | None:
        """Above 0 where a scaler met inf or NaN here, or a gradient that is stepped and not clipped
        holds some. None where there is nothing to look at."""
        found: Any = self.scaler.found_inf(device) if self.scaler.enabled else None
        others = self.unmanaged_grads() if self.guards_unmanaged and self.steps_others else []
        if others:
            maxima = TensorList.of(others).power_sums(math.inf).to(device)
            bad = (~maxima.isfinite()).sum().double()
            found = bad if found is None else torch.maximum(found, bad)
        return float(found) if on_host and found is not None else found

    def still_scaled(self, present: Collection[int], pieces: Sequence[ParamPiece]) -> list[str]:
        """A text if a scaled gradient belongs to no optimizer that was passed: the scaler's records
        of these say whether a gradient is still scaled."""
        if not self.scaler.enabled or self.target == "param":
            return []
        left = sorted(set(present).difference(*(o.pieces for o in self.optimizers)))
        if not left:
            return []
        return [
            f"{pieces[left[0]].name} has a scaled gradient and is in none of the optimizers that "
            f"were passed ({len(left)} parameter{'s' if len(left) > 1 else ''} in all); pass all "
            f"of "
            "the scaler's optimizers in one call"
        ]


@dataclass(frozen=True, slots=True)
class RequestMaker:
    """Checks a call's arguments. Prepared at set-up. A call that leaves all at their defaults is
    the same request each time.

    Args:
        index: which optimizer steps which pieces.
        propagates: every step is taken, whatever the norm.
        on_host: a scaler's numbers are read at once.
    """

    index: OptimizerIndex
    device: torch.device
    propagates: bool
    on_host: bool
    _plain: dict[tuple[str, str], Request] = field(
        init=False, repr=False, compare=False, default_factory=dict[tuple[str, str], Request]
    )

    def make(
        self,
        operation: str,
        optimizers: Sequence[Any] = (),
        scaler: Any = None,
        grad_scale: float = 1.0,
        of: Any = "grad",
        note: Any = None,
        **flags: Any,
    ) -> Request:
        """What is wrong with the arguments is told once all ranks have met: it may be wrong on one
        of them alone."""
        plain = (
            not (optimizers or flags or scaler is not None or note is not None)
            and type(grad_scale) is float
            and grad_scale == 1
            and type(of) is str
        )
        known = self._plain.get((operation, of)) if plain else None
        if known is not None:
            return known
        request = self._make_checked(operation, optimizers, scaler, grad_scale, of, note, flags)
        if plain and request.error is None:
            self._plain[operation, of] = request
        return request

    def _make_checked(
        self,
        operation: str,
        optimizers: Sequence[Any],
        scaler: Any,
        grad_scale: float,
        of: Any,
        note: Any,
        flags: Mapping[str, Any],
    ) -> Request:
        guards = not self.propagates
        owned: tuple[OptimizerParams, ...] = ()
        try:
            if operation == "step" and not optimizers:
                raise ConfigError(
                    "step() was given no optimizer; pass those that hold the clipped parameters, "
                    "or use clip_()"
                )
            check_optimizers(operation, optimizers)
            owned = tuple(map(self.index.params_of, optimizers))
            if operation == "step":
                check_step_signatures(owned)
            if not is_text(of, "grad", "param"):
                raise ConfigError(f"{operation}(of={of!r}): it is 'grad' or 'param'")
            for name, flag in flags.items():
                check_flag(f"{operation}(): {name}", flag)
            if type(grad_scale) is not float or not 0 < grad_scale < math.inf:
                grad_scale = _checked_grad_scale(grad_scale)
            state = ScalerState(scaler, optimizers, self.device, self.on_host)
            steps_others = False
            for o in owned:
                if o.unmanaged or o.hidden or not o.pieces:
                    steps_others = True
            if state.enabled and self.propagates:
                raise ConfigError(
                    "on_nonfinite='propagate' and an enabled scaler exclude each other: steps that "
                    "overflow must be skipped, else the loss scale could never back off; use 'skip'"
                )
            return Request(
                operation,
                owned,
                state,
                grad_scale,
                target=of,
                note=None if note is None else _note_text(operation, note),
                guards_unmanaged=guards,
                steps_others=steps_others,
            )
        except ConfigError as error:
            problem = error
        except Exception as error:  # an argument that answers otherwise than its kind does
            problem = ConfigError(f"{operation}(): {type(error).__name__}: {error}")
            problem.__cause__ = error
        unscaled = ScalerState(None, owned, self.device, self.on_host)
        return Request(operation, owned, unscaled, error=problem, guards_unmanaged=guards)


def _checked_grad_scale(given: Any) -> float:
    """ConfigError for what is no number of Python's, not positive or not finite."""
    is_plain = isinstance(given, (int, float))
    value = as_number(given)
    if not is_plain or not 0 < value < math.inf:
        kind = ", a number of Python's" if not is_plain and hasattr(given, "__float__") else ""
        raise ConfigError(f"grad_scale={given!r} must be positive and finite{kind}")
    return value


def _note_text(operation: str, note: Any) -> str:
    """Its JSON; inf and NaN, which a note of a bad step may well hold, as Python writes them.

    Raises:
        ConfigError: it has none.
    """
    try:
        return json.dumps(note, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{operation}(note=...): {error}. A note is what JSON can write: texts, numbers, lists "
            "and dictionaries of them, such as loss.item() and indices.tolist()"
        ) from error
