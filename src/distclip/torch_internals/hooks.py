"""Hooks that run as soon as a gradient is accumulated: torch has no public way to ask for them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def accumulate_hooks(param: Tensor) -> list[Callable[..., object]]:
    """Those of `register_post_accumulate_grad_hook`."""
    return list((getattr(param, "_post_accumulate_grad_hooks", None) or {}).values())
