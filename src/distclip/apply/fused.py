"""A fused optimizer applies the coefficient in its own pass, so that clipping writes no
gradient.

torch's fused kernels divide each gradient by `optimizer.grad_scale` and leave everything alone
where `optimizer.found_inf` is 1; the two attributes were made for GradScaler. They are set for one
step and removed after it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from itertools import repeat
from operator import attrgetter, is_

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from distclip.torch_internals.dtensor import is_dtensor_class

# exactly these: RMSprop, NAdam, Muon and subclasses may ignore both attributes in silence
_KINDS = (SGD, Adam, AdamW, Adagrad)
_LOW = frozenset({torch.float16, torch.bfloat16})
_GRAD, _IS_SPARSE, _DTYPE = attrgetter("grad"), attrgetter("is_sparse"), attrgetter("dtype")


def can_fold(optimizer: Optimizer, param_ids: AbstractSet[int]) -> bool:
    """Whether one coefficient, applied by the optimizer itself, is the whole clip of its gradients.

    Args:
        param_ids: identities of the parameters that share this coefficient.
    """
    if type(optimizer) not in _KINDS:
        return False
    groups = optimizer.param_groups
    if any(group.get("fused") is not True for group in groups):  # load_state_dict can turn it off
        return False
    params: list[Tensor] = [param for group in groups for param in group["params"]]
    grads = list(map(_GRAD, params))
    if any(map(is_, grads, repeat(None))):
        params = [param for param, grad in zip(params, grads, strict=True) if grad is not None]
        grads = [grad for grad in grads if grad is not None]
    if not param_ids >= set(map(id, params)):
        return False
    if any(map(_IS_SPARSE, grads)) or any(map(Tensor.is_complex, params)):
        return False
    if isinstance(optimizer, (SGD, Adagrad)) and any(map(is_dtensor_class, set(map(type, params)))):
        return False  # not implemented in torch
    if isinstance(optimizer, SGD) and not _LOW.isdisjoint(map(_DTYPE, params)):
        # torch leaves most elements unchanged there
        return not any(param.is_cpu and param.dtype in _LOW for param in params)
    return True


def step_fused(
    optimizer: Optimizer, divisor: Tensor | None, stop: Tensor | None, step: Callable[[], object]
) -> None:
    """`optimizer.step()` on gradients divided by `divisor`; nothing moves where `stop` is above 0.
    No host sync.

    Args:
        step: the optimizer's own, or that of a wrapper which forwards to it and keeps count.
        divisor: [] float32; None is 1 (on the CPU a fused step with a divisor is slower).
        stop: [] float32, or None where the step is known to be taken.
    """
    if stop is not None:
        _prepare_momentum(optimizer)
    try:
        if divisor is not None:
            optimizer.grad_scale = divisor  # pyright: ignore[reportAttributeAccessIssue]
        if stop is not None:
            optimizer.found_inf = stop  # pyright: ignore[reportAttributeAccessIssue]
        step()
    finally:
        for name in ("grad_scale", "found_inf"):
            if hasattr(optimizer, name):
                delattr(optimizer, name)


def _prepare_momentum(optimizer: Optimizer) -> None:
    """Fused SGD that skips its first step leaves its momentum buffers uninitialised: zero buffers
    give the same first step."""
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        for param in group["params"] if group["momentum"] else ():
            if param.grad is not None and optimizer.state[param].get("momentum_buffer") is None:
                optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)


def skip_is_safe(optimizer: Optimizer) -> bool:
    """Whether a step that `stop` suppresses leaves the optimizer as it was: zero buffers are a
    first step only without dampening."""
    if not isinstance(optimizer, SGD):
        return True
    return all(
        not group["momentum"]
        or not group["dampening"]
        or all("momentum_buffer" in optimizer.state.get(p, {}) for p in group["params"])
        for group in optimizer.param_groups
    )
