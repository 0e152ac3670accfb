"""What runs inside `backward()`, as soon as a gradient is there: torch has no public way to ask for
it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

# DDP's communication hooks that step an optimizer
_STEPPING_HOOKS = {
    "hook_with_zero_fn",
    "hook_with_zero_interleaved_fn",
    "hook_then_optimizer_wrapper",
    "apply_optim_in_backward_hook",
}


def accumulate_hooks(param: Tensor) -> list[Callable[..., object]]:
    """Those of `register_post_accumulate_grad_hook`."""
    return list((getattr(param, "_post_accumulate_grad_hooks", None) or {}).values())


def optimizers_in_backward(param: Tensor) -> list[Any]:
    """Those of `_apply_optimizer_in_backward`, torch's and torchrec's: they step this parameter in
    a hook, and set its gradient to None."""
    return list(getattr(param, "_in_backward_optimizers", ()))


def steps_in_comm_hook(hook: Callable[..., object]) -> bool:
    """Whether a communication hook of DDP is one of torch's that step an optimizer."""
    return getattr(hook, "__name__", "") in _STEPPING_HOOKS
