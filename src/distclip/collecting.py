"""Stage 3a: parameters → this rank's gradient tensors, each compared with the plan. What is wrong becomes a text, never an early exit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.distributed.tensor import DTensor

from distclip.naming import Slot
from distclip.placement import local_tensor
from distclip.records import Piece

GradOf = Callable[[Tensor], "Tensor | None"]


@dataclass(slots=True)
class Grads:
    """One step's gradients of this rank."""

    index: list[int] = field(default_factory=list)  # pieces that have one of their own
    local: list[Tensor] = field(default_factory=list)  # the tensors, plain, one for each of `index`
    present: list[int] = field(default_factory=list)  # pieces that have one, listed twice or not
    faults: list[str] = field(default_factory=list)


def own_grad(param: Tensor) -> Tensor | None:
    return param.grad


def collect(params: Sequence[Tensor], pieces: Sequence[Piece], slots: Sequence[Slot], grad_of: GradOf) -> Grads:
    """Never communicates. A gradient that two parameters share is taken once."""
    grads = Grads()
    seen: set[int] = set()
    for i, (param, piece) in enumerate(zip(params, pieces, strict=True)):
        grad = grad_of(param)
        if grad is None:
            continue
        grads.present.append(i)
        if id(grad) in seen:
            continue
        seen.add(id(grad))
        fault = _misplaced(grad, piece)
        local = local_tensor(grad)
        if fault is None and tuple(local.shape) != piece.local_shape:
            fault = (
                f"the gradient of {piece.name} has local shape {tuple(local.shape)}, the plan says {piece.local_shape} "
                f"({piece.holding.how}); it is not sharded or reduced yet (no_sync?): clip after the reduction, or call "
                "clipper.rebuild() if the parameter was changed"
            )
        if fault is None:
            grads.index.append(i)
            grads.local.append(local)
        else:
            grads.faults.append(fault)
    if not grads.present and (hooks := _hooks(params, pieces)):
        grads.faults.append(
            f"no parameter has a gradient, and {hooks} runs as soon as a gradient is accumulated: an optimizer that steps inside backward "
            "leaves nothing to clip, and the global norm is not known yet there; step after the clip, without this hook"
        )
    replaced = [slot.path for slot in slots if slot.replaced()]
    if replaced:
        grads.faults.append(
            f"{replaced[0]} was replaced after the clipper was built ({len(replaced)} in all); call clipper.rebuild() on all ranks"
        )
    return grads


def _misplaced(grad: Tensor, piece: Piece) -> str | None:
    if isinstance(grad, DTensor):
        if piece.placements is None:
            return (
                f"the gradient of {piece.name} is a DTensor with placements {grad.placements}, its parameter is not; call clipper.rebuild()"
            )
        if grad.placements != piece.placements:
            if any(placement.is_partial() for placement in grad.placements):
                return (
                    f"the gradient of {piece.name} has placements {grad.placements}: Partial sums that are not reduced yet (sequence "
                    "parallelism leaves them on norm weights); before clipping: "
                    "p.grad = p.grad.redistribute(placements=p.placements)"
                )
            return (
                f"the gradient of {piece.name} has placements {grad.placements}, its parameter {piece.placements}; before clipping: "
                "p.grad = p.grad.redistribute(placements=p.placements)"
            )
    elif piece.placements is not None:
        return f"the gradient of {piece.name} is a plain tensor, its parameter a DTensor, {piece.placements}; call clipper.rebuild()"
    return None


def _hooks(params: Sequence[Tensor], pieces: Sequence[Piece]) -> str:
    """The first hook of `register_post_accumulate_grad_hook`, and of how many parameters."""
    hooked = [(piece.name, found) for param, piece in zip(params, pieces, strict=True) if (found := _hooks_of(param))]
    if not hooked:
        return ""
    name, (hook, *_) = hooked[0]
    return f"the hook {getattr(hook, '__qualname__', type(hook).__qualname__)} of {name} ({len(hooked)} parameters have such hooks)"


def _hooks_of(param: Tensor) -> list[Callable[..., object]]:
    return list((getattr(param, "_post_accumulate_grad_hooks", None) or {}).values())
