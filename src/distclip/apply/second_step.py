"""An `optimizer.step()` that was left in beside `clipper.step(optimizer)` moves parameters twice by
the same gradients. Looked for at a clipper's first steps: a loop has it at each."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from distclip.decide.warn import warn_or_log
from distclip.measure.gradient_cache import TensorRef
from distclip.request import Request
from distclip.torch_internals.dtensor import dtensor_local, is_dtensor


class SecondStepWatch:
    """From one `clipper.step` to the next, a hook on each optimizer that was stepped.

    It warns if the optimizer is stepped with a gradient that is the same tensor as at
    `clipper.step`, before it or behind it, unwritten since (but by a scaler's `unscale_`).
    `zero_grad()` takes it away or writes to it, and `backward()` does so too: a step after either
    is one of its own.

    Hooks go at the next `clipper.step`, or with this object.

    Args:
        steps: how many are watched, so that some are taken where a loss scale is looked for.
    """

    def __init__(self, steps: int = 10) -> None:
        self._left = steps
        self._hooks: list[_StepHook] = []
        self._handles: list[Any] = []
        self._told: list[str] = []  # the hooks': they do not hold this object
        weakref.finalize(self, _remove, self._handles).atexit = False

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has optimizers of its own to watch."""
        return SecondStepWatch, (self._left,)

    def begin(self, members: Sequence[Tensor], request: Request, was_skipped: bool) -> None:
        """After a step.

        Args:
            members: [pieces] the parameters.
            was_skipped: it was left out.
        """
        self._left -= 1
        for owned in request.optimizers:
            params = (members[i] for i in owned.pieces)
            param = next((p for p in params if p.grad is not None), None)
            if param is None or _grad_of(param).is_inference():  # these count no writes
                continue
            hook = _StepHook(param, request.scaler.enabled, was_skipped, self._told)
            try:
                self._handles.append(owned.optimizer.register_step_pre_hook(hook))
            except AttributeError:  # a wrapper that has no such hooks, or never set them up
                continue
            self._hooks.append(hook)

    def end(self) -> SecondStepWatch | None:
        """Before the next step: what watches that, or None where enough was seen."""
        for hook in self._hooks:
            hook.check_stepped_before()
        self._hooks.clear()
        _remove(self._handles)
        return self if self._left and not self._told else None


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


class _SeenGradient:
    """A parameter's gradient as it is now.

    Args:
        writes: how many may follow without making it another.
    """

    def __init__(self, param: Tensor, writes: int = 0) -> None:
        assert param.grad is not None
        self._param: Callable[[], Tensor | None] = TensorRef(param)
        self._grad: Callable[[], Tensor | None] = TensorRef(param.grad)
        self._version, self._writes = _grad_of(param)._version, writes

    def is_still_there(self) -> bool:
        param, grad = self._param(), self._grad()
        if param is None or grad is None or param.grad is not grad:
            return False
        return 0 <= _grad_of(param)._version - self._version <= self._writes


class _StepHook:
    """A pre-hook of an optimizer's step.

    Args:
        param: one that it steps, with a gradient.
        has_scaler: which may write to the gradient once, to unscale it.
        told: gets the warning's text.
    """

    def __init__(self, param: Tensor, has_scaler: bool, was_skipped: bool, told: list[str]) -> None:
        self._param: Callable[[], Tensor | None] = TensorRef(param)
        self._clipped = _SeenGradient(param, int(has_scaler))
        self._stepped: tuple[str, _SeenGradient] | None = None  # by whom, with what
        self._was_skipped, self._told = was_skipped, told

    def __call__(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        param = self._param()
        # a closure makes gradients of its own
        has_closure = any(arg is not None for arg in (*args[1:], *kwargs.values()))
        if has_closure or param is None or param.grad is None:
            return
        name = type(optimizer).__name__
        if not self._clipped.is_still_there():
            if not _grad_of(param).is_inference():
                self._stepped = name, _SeenGradient(param)
            return
        what = (
            "clipper.step() has left this step out"
            if self._was_skipped
            else "clipper.step() has taken this step, so that parameters move twice"
        )
        self._tell(f"{name}.step() comes behind", what)

    def check_stepped_before(self) -> None:
        """Before the next step of the clipper."""
        if self._stepped is not None and self._stepped[1].is_still_there():
            what = "parameters move twice, the first time unclipped"
            self._tell(f"{self._stepped[0]}.step() comes before", what)

    def _tell(self, seen: str, what: str) -> None:
        if self._told:
            return
        self._told.append(
            f"{seen} clipper.step(optimizer), with the same gradients: {what}. Remove "
            "optimizer.step(), or scaler.step() and scaler.update(), from your loop, or keep it "
            "and call clipper.clip_() before it in place of clipper.step()"
        )
        warn_or_log(self._told[0])


def _grad_of(param: Tensor) -> Tensor:
    """Its gradient's own memory."""
    grad: Any = param.grad
    return dtensor_local(grad) if is_dtensor(grad) else grad
