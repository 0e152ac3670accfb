"""A threshold that changes with the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distclip.errors import ConfigError
from distclip.policies.fixed import checked_threshold, clip_coefficient
from distclip.records import Norms, Scale

Points = Sequence[tuple[float, float]]
Function = Callable[[Tensor], "Tensor | float"]


class ScheduledState(NamedTuple):
    step: Tensor  # [] int64: steps taken so far


@dataclass(frozen=True, repr=False)
class Scheduled:
    """g ← g · c(t) / max(|g|, c(t)), where t is the number of steps taken before this one: 0 at the
    first.

    Tracks no norm and sends nothing. Steps that were skipped do not count.

    Args:
        schedule: points ((t, threshold), …), linear between them and constant outside; or a
            function of t, a [] float64 tensor on the norms' device, to a number or a tensor, [] or
            [groups]. It must be pure and must not read t on the host (`if t < 10`). Its value at 0
            is checked; later on a negative value counts as 0 and a NaN clips nothing.
        allow_zero: accept 0, which zeroes every gradient.

    Raises:
        ConfigError: no points, steps that do not rise, a threshold that is negative, NaN, infinite,
            or zero without `allow_zero`.
    """

    schedule: Points | Function
    allow_zero: bool = field(default=False)
    user_threshold = True  # set by the user: if it nearly always clips, a warning says so

    def __post_init__(self) -> None:
        if callable(self.schedule):
            first = _first_value(self.schedule)
            checked_threshold("Scheduled: schedule(0)", first, self.allow_zero)
            return
        points = _as_points(self.schedule)
        if not points:
            raise ConfigError(
                "Scheduled: schedule has no points; give at least one (step, threshold)"
            )
        for step, threshold in points:
            checked_threshold(
                f"Scheduled: the threshold at step {step:g}", threshold, self.allow_zero
            )
            if math.isinf(threshold) or not math.isfinite(step):
                raise ConfigError(
                    f"Scheduled: point ({step:g}, {threshold:g}) is not finite; to "
                    f"clip nothing at first, use Warmup"
                )
        for (a, _), (b, _) in pairwise(points):
            if not a < b:
                raise ConfigError(
                    f"Scheduled: step {b:g} comes after step {a:g}; the steps of the "
                    f"points must rise"
                )
        object.__setattr__(self, "schedule", points)

    def __repr__(self) -> str:
        """Equal on all ranks and in the next run: a function is shown by its name, not by its
        address."""
        told = self.schedule
        if callable(told):
            named = told if hasattr(told, "__qualname__") else type(told)
            told = f"{named.__module__}.{named.__qualname__}"
        return f"Scheduled({told})"

    def init(self, groups: int, device: torch.device) -> ScheduledState:
        return ScheduledState(torch.zeros((), dtype=torch.int64, device=device))

    def decide(self, norms: Norms, state: tuple[Tensor, ...]) -> tuple[Scale, ScheduledState]:
        (step,) = state
        at = step.double()
        value = (
            self.schedule(at) if callable(self.schedule) else _interpolate_points(self.schedule, at)
        )
        threshold = (torch.zeros_like(norms.per_group) + value).clamp(min=0)
        return Scale(clip_coefficient(norms.per_group, threshold), threshold), ScheduledState(
            step + norms.finite
        )


def _first_value(schedule: Function) -> float:
    try:
        first = schedule(torch.zeros((), dtype=torch.float64, device="cpu"))
        return float(torch.as_tensor(first, device="cpu").min())
    except Exception as error:
        raise ConfigError(
            f"Scheduled: schedule(0) failed by {error!r}; it takes a [] float64 tensor, "
            " the step, and gives a number or a tensor"
        ) from error


def _as_points(schedule: Any) -> tuple[tuple[float, float], ...]:
    try:
        return tuple((float(step), float(threshold)) for step, threshold in schedule)
    except Exception as error:
        raise ConfigError(
            f"Scheduled: schedule={schedule!r} is neither a function nor points: "
            "[(step, threshold), ...]"
        ) from error


def _interpolate_points(points: Points, step: Tensor) -> Tensor:
    """[] float64. Exact at the points; scalars only, so that nothing is copied to the device."""
    value = torch.full_like(step, points[0][1])
    for (a, low), (b, high) in pairwise(points):
        part = ((step - a) / (b - a)).clamp(0, 1)
        value = torch.where(step > a, low * (1 - part) + high * part, value)
    return value
