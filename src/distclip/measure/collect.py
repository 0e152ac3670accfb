"""Stage 3a: parameters → this rank's gradient tensors, each compared with the plan. What is wrong
becomes a text, never an early exit.

A step compares its gradients with those that were found right before (`expected`), all at once.
Where anything differs, parameters are looked at one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, is_

import torch
from torch import Tensor

from distclip.kernels.tensor_list import PLAIN, TensorList
from distclip.measure.grad_placements import (
    kind_error,
    placed_otherwise,
    portion_of,
    redistribute_advice,
)
from distclip.measure.gradient_cache import GradientCache
from distclip.records import Piece
from distclip.setup.parameters import ModuleEntry
from distclip.setup.placement import DEVICES
from distclip.torch_internals.dtensor import local_tensor

GradOf = Callable[[Tensor], "Tensor | None"]
own_grad: GradOf = attrgetter("grad")
_REMEMBERED = 8  # sets of gradients that are there: experts come and go


@dataclass(frozen=True, slots=True)
class Present:
    """Which pieces have a gradient; made once for as long as they are the same."""

    own: tuple[int, ...]  # pieces that have one of their own: those of a GradList, in its order
    all: tuple[int, ...]  # pieces that have one, shared with another piece or not
    index: Tensor | None  # `own` as int64 on the compute device, or None where these are all pieces
    has: Tensor  # [pieces] float64 on the compute device: 1 where there is one
    # pieces whose gradients are placed otherwise than their parameters
    otherwise: frozenset[int] = frozenset()
    portions: tuple[float, ...] = ()  # of `own`: what such gradients count; () where all count 1
    portion: Tensor | None = None  # the same on the compute device, float64

    def key(self) -> tuple[object, ...]:
        """Equal for equal ones."""
        return self.own, self.all, self.otherwise, self.portions


@dataclass(slots=True)
class Grads:
    """One step's gradients of this rank."""

    present: Present
    list: TensorList
    faults: list[str] = field(default_factory=lambda: [])

    @classmethod
    def none(cls) -> Grads:
        nothing = torch.zeros(0, device="cpu")
        return cls(Present((), (), nothing.long(), nothing), TensorList.of(()))


class Collector:
    """Fetches gradients and compares them with the plan. Never communicates.

    Args:
        members: [pieces] the parameters.
        grad_of: where a parameter's gradient is; None for `.grad`.
        device: the compute device.
    """

    def __init__(
        self,
        members: Sequence[Tensor],
        pieces: Sequence[Piece],
        slots: Sequence[ModuleEntry],
        grad_of: GradOf | None,
        device: torch.device,
    ) -> None:
        self.members, self.pieces, self.slots, self.device = members, pieces, slots, device
        self.grad_of = grad_of or own_grad
        self._tables = [slot.table for slot in slots]
        self._keys = [slot.key for slot in slots]
        self._held = [slot.value for slot in slots]
        self._expected: dict[
            bytes, tuple[Present, GradientCache]
        ] = {}  # by which gradients are there
        self._present: Present | None = None

    def collect(self) -> Grads:
        """A gradient that two parameters share is taken once."""
        grads = list(map(self.grad_of, self.members))
        has = bytes([grad is not None for grad in grads])
        expected = self._expected.get(has)
        if expected is not None and all(
            map(is_, map(dict.get, self._tables, self._keys), self._held)
        ):
            present, like = expected
            found = like.found(
                grads if 0 not in has else [grad for grad in grads if grad is not None]
            )
            if found is not None:
                return Grads(present, found)
        return self._collect_checked(grads, has)

    def some(self, mine: Sequence[int]) -> Grads:
        """Of these pieces alone, as they are now; one that two share is taken once."""
        found = [
            (i, local_tensor(grad))
            for i in mine
            if (grad := self.grad_of(self.members[i])) is not None
        ]
        own = list({_memory(grad): i for i, grad in reversed(found)}.values())[::-1]
        local = {i: grad for i, grad in found}
        return Grads(
            self.present(own, [i for i, _ in found]), TensorList.of([local[i] for i in own])
        )

    def _collect_checked(self, grads: Sequence[Tensor | None], has: bytes) -> Grads:
        own: list[int] = []
        every: list[int] = []
        local: list[Tensor] = []
        faults: list[str] = []
        portions: list[float] = []
        misplaced: list[tuple[str, Tensor]] = []
        otherwise: set[int] = set()
        seen: set[tuple[int, ...]] = set()
        for i, (grad, piece) in enumerate(zip(grads, self.pieces, strict=True)):
            if grad is None:
                continue
            every.append(i)
            fault = kind_error(grad, self.members[i], piece)
            portion = portion_of(grad, piece) if fault is None else 1.0
            if isinstance(portion, str):
                misplaced.append((portion, grad))
                continue
            if placed_otherwise(grad, piece):
                otherwise.add(i)
            tensor = local_tensor(grad)
            memory = _memory(tensor)
            if memory in seen:
                continue
            seen.add(memory)
            if fault is None and tensor.device.type not in DEVICES:
                fault = (
                    f"the gradient of {piece.name} is on the device {tensor.device}; distclip "
                    f"clips on the CPU and on CUDA. Move the "
                    "parameter there and call clipper.rebuild()"
                )
            elif fault is None and tuple(tensor.shape) != piece.local_shape and i not in otherwise:
                fault = (
                    f"the gradient of {piece.name} has local shape {tuple(tensor.shape)}, the plan "
                    f"says {piece.local_shape} "
                    f"({piece.holding.description}); it is not sharded or reduced yet (no_sync?): clip "
                    f"after the reduction, or call "
                    "clipper.rebuild() if the parameter was changed"
                )
            if fault is None:
                own.append(i)
                local.append(tensor)
                portions.append(portion)
            else:
                faults.append(fault)
        if misplaced:
            texts, wrong = zip(*misplaced, strict=True)
            faults.append(
                texts[0] + redistribute_advice(wrong, elsewhere=self.grad_of is not own_grad)
            )
        if not every and (hooks := _hooks(self.members, self.pieces)):
            faults.append(
                f"no parameter has a gradient, and {hooks} runs as soon as a gradient is "
                f"accumulated: an optimizer that steps inside "
                "backward leaves nothing to clip, and the global norm is not known yet there; step "
                "after the clip, without this hook"
            )
        if self.grad_of is not own_grad and local and (fault := self._returns_new_tensor(every[0])):
            faults.append(fault)
        replaced = [slot.path for slot in self.slots if slot.replaced()]
        if replaced:
            faults.append(
                f"{replaced[0]} was replaced after the clipper was built ({len(replaced)} in all); "
                f"call clipper.rebuild() on all ranks"
            )
        given = tuple(portions) if set(portions) - {1.0} else ()
        key = (tuple(own), tuple(every), frozenset(otherwise), given)
        # making one sends its tensors to the device
        if self._present is None or self._present.key() != key:
            self._present = self.present(*key)
        found = Grads(self._present, TensorList.of(local), faults)
        if len(self._expected) >= _REMEMBERED:
            self._expected.clear()
        self._expected.pop(has, None)
        if not faults and len(own) == len(every):
            expected = GradientCache.of(
                [grad for grad in grads if grad is not None], found.list, self.device
            )
            if expected is not None:
                self._expected[has] = self._present, expected
        return found

    def _returns_new_tensor(self, i: int) -> str | None:
        """What is wrong with a `grad_of` that makes a new tensor at each call."""
        first, second = self.grad_of(self.members[i]), self.grad_of(self.members[i])
        if (
            first is None
            or second is None
            or _memory(local_tensor(first)) == _memory(local_tensor(second))
        ):
            return None
        return (
            f"grad_of makes a new tensor for {self.pieces[i].name} at each call, so that clipping "
            f"it changes nothing; return the tensor "
            "that the optimizer reads"
        )

    def present(
        self,
        own: Sequence[int],
        every: Sequence[int],
        otherwise: frozenset[int] = frozenset(),
        portions: tuple[float, ...] = (),
    ) -> Present:
        count = len(self.members)
        has = torch.zeros(count, dtype=torch.float64, device="cpu")
        has[list(every)] = 1
        index = (
            None
            if len(own) == count
            else torch.tensor(own, dtype=torch.int64, device="cpu").to(self.device)
        )
        portion = (
            torch.tensor(portions, dtype=torch.float64, device="cpu").to(self.device)
            if portions
            else None
        )
        return Present(
            tuple(own), tuple(every), index, has.to(self.device), otherwise, portions, portion
        )


def _memory(tensor: Tensor) -> tuple[int, ...]:
    """Equal for two gradients that are the same, be they one object or two over the same memory."""
    if type(tensor) not in PLAIN or tensor.layout is not torch.strided or not tensor.numel():
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.numel())


def _hooks(params: Sequence[Tensor], pieces: Sequence[Piece]) -> str:
    """The first hook of `register_post_accumulate_grad_hook`, and of how many parameters."""
    hooked = [
        (piece.name, found)
        for param, piece in zip(params, pieces, strict=True)
        if (found := _hooks_of(param))
    ]
    if not hooked:
        return ""
    name, (hook, *_) = hooked[0]
    return (
        f"the hook {getattr(hook, '__qualname__', type(hook).__qualname__)} of {name} "
        f"({len(hooked)} parameters have such hooks)"
    )


def _hooks_of(param: Tensor) -> list[Callable[..., object]]:
    return list((getattr(param, "_post_accumulate_grad_hooks", None) or {}).values())
