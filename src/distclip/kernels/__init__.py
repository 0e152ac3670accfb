"""Optional fast paths, and which of them is used; plain torch operations are the reference."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from distclip.errors import ConfigError
from distclip.kernels.native import CODES, load_library
from distclip.kernels.native import plan_for as native_plan
from distclip.kernels.triton_lists import CODES as TRITON_CODES
from distclip.kernels.triton_lists import has_triton
from distclip.kernels.triton_lists import plan_for as triton_plan

CHOICE = "DISTCLIP_KERNELS"


class KernelPlan(Protocol):
    """A list of tensors of known sizes and dtypes, prepared once; pointers change from step to step
    (0: no tensor)."""

    def power_sums(self, pointers: array[int], p: float, out: Tensor | None = None) -> Tensor: ...
    def clamped_sums(self, pointers: array[int], values: Tensor, p: float) -> Tensor: ...
    def scale_(self, pointers: array[int], factors: float | Tensor) -> None: ...
    def clamp_(self, pointers: array[int], values: Tensor) -> None: ...


def active() -> str:
    """Which kernels compute on CPU gradients: "native", or "torch (why)". The answer may differ
    between ranks.

    The environment variable DISTCLIP_KERNELS chooses: "torch" never uses the native ones, "native"
    raises without them.

    Raises:
        ConfigError: the variable has another value, or the native kernels that it asks for are
            missing.
    """
    chosen = os.environ.get(CHOICE, "")
    if chosen not in ("", "native", "torch"):
        raise ConfigError(
            f"{CHOICE}={chosen!r} is neither 'native' nor 'torch'; unset it to have distclip choose"
        )
    if chosen == "torch":
        return f"torch ({CHOICE}=torch)"
    found = load_library()
    if not isinstance(found, str):
        return "native"
    if chosen == "native":
        raise ConfigError(
            f"{CHOICE}=native, but there are no native kernels: {found}. Unset "
            f"{CHOICE} to go on with torch's operations"
        )
    return f"torch ({found})"


def kernels_for(dtypes: Iterable[torch.dtype], device: torch.device) -> str:
    """Which kernels serve a list of tensors of these dtypes on `device`: "triton", "native", or
    "torch" where torch's operations are used.

    Raises:
        ConfigError: as `active` does.
    """
    present = set(dtypes)
    if device.type == "cuda":
        serves = TRITON_CODES.keys() >= present and has_triton()
        return "triton" if serves and os.environ.get(CHOICE, "") != "torch" else "torch"
    serves = device.type == "cpu" and CODES.keys() >= present
    return "native" if serves and active() == "native" else "torch"


def plan_for(
    counts: tuple[int, ...], dtypes: Sequence[torch.dtype], device: torch.device
) -> KernelPlan | None:
    """The kernels prepared for tensors of these sizes and dtypes on `device`, or None where torch's
    operations are used.

    Raises:
        ConfigError: as `active` does.
    """
    kernels = kernels_for(dtypes, device)
    if kernels == "triton":
        return triton_plan(counts, tuple(dtypes), device)
    return native_plan(counts, tuple(dtypes)) if kernels == "native" else None
