"""Stage 3a: parameters → this rank's gradient tensors, each compared with the plan. What is wrong becomes a text, never an early exit.

What the plan expects is laid out in lists once for each set of parameters that have a gradient; a step then compares list with list,
which costs half a microsecond a parameter, and a third of one where gradients are the tensors that the step before met, at the same
addresses. Where anything differs, parameters are looked at one by one.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, is_
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distclip import kernels
from distclip.gradlist import PLAIN, GradList, is_block
from distclip.naming import Slot
from distclip.placement import local_tensor
from distclip.records import Piece

GradOf = Callable[[Tensor], "Tensor | None"]
own_grad: GradOf = attrgetter("grad")
_POINTER, _STRIDES, _CONTIGUOUS = Tensor.data_ptr, Tensor.stride, Tensor.is_contiguous
_SHAPE, _DTYPE, _SPEC, _LOCAL = attrgetter("shape"), attrgetter("dtype"), attrgetter("_spec"), attrgetter("_local_tensor")
_ON_CPU, _BYTES = attrgetter("is_cpu"), attrgetter("nbytes")
_REMEMBERED = 8  # sets of gradients that are there: experts come and go


@dataclass(frozen=True, slots=True)
class Present:
    """Which pieces have a gradient; made once for as long as they are the same."""

    own: tuple[int, ...]  # pieces that have one of their own: those of a GradList, in its order
    all: tuple[int, ...]  # pieces that have one, shared with another piece or not
    index: Tensor | None  # `own` as int64 on the compute device, or None where these are all pieces
    has: Tensor  # [pieces] float64 on the compute device: 1 where there is one


@dataclass(slots=True)
class Grads:
    """One step's gradients of this rank."""

    present: Present
    list: GradList
    faults: list[str] = field(default_factory=lambda: [])

    @classmethod
    def none(cls) -> Grads:
        nothing = torch.zeros(0, device="cpu")
        return cls(Present((), (), nothing.long(), nothing), GradList.of(()))


@dataclass(slots=True)
class _Met:
    """The gradients of the step before, not kept alive. One that is still the same tensor, with as many bytes at the same address, needs
    no other look: what `.data =` or `resize_` can make of a tensor shows in one of these."""

    first: ref[Tensor]
    all: list[ref[Tensor]]  # empty where the first was another one at the step before: then they are new at every step
    sizes: list[int]  # bytes
    addresses: list[int]
    pointers: array[int]  # the same, as a kernel takes them


@dataclass(slots=True)
class _Expected:
    """What the lists of a step are compared with."""

    types: list[type]
    shapes: list[torch.Size]
    strides: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    specs: list[object]  # of the DTensors among them
    layout: kernels.Layout | None
    odd: Sequence[int]  # positions that torch computes: all, or none
    filled: int  # distinct addresses: tensors that are not empty, and one for those that are
    present: Present
    met: _Met | None = None


class Collector:
    """Fetches gradients and compares them with the plan. Never communicates.

    Args:
        members: [pieces] the parameters.
        grad_of: where a parameter's gradient is; None for `.grad`.
        device: the compute device.
    """

    def __init__(
        self, members: Sequence[Tensor], pieces: Sequence[Piece], slots: Sequence[Slot], grad_of: GradOf | None, device: torch.device
    ) -> None:
        self.members, self.pieces, self.slots, self.device = members, pieces, slots, device
        self.grad_of = grad_of or own_grad
        self._tables = [slot.table for slot in slots]
        self._keys = [slot.key for slot in slots]
        self._held = [slot.value for slot in slots]
        self._expected: dict[bytes, _Expected] = {}  # by which gradients are there
        self._present: Present | None = None

    def collect(self) -> Grads:
        """A gradient that two parameters share is taken once."""
        grads = list(map(self.grad_of, self.members))
        has = bytes([grad is not None for grad in grads])
        expected = self._expected.get(has)
        if expected is not None and all(map(is_, map(dict.get, self._tables, self._keys), self._held)):
            given = grads if 0 not in has else [grad for grad in grads if grad is not None]
            try:
                found = self._met_again(given, expected) or self._compared(given, expected)
            except (AttributeError, RuntimeError):  # a kind of tensor that the lists do not foresee
                found = None
            if found is not None:
                return Grads(expected.present, found)
        return self._looked_at(grads, has)

    def some(self, mine: Sequence[int]) -> Grads:
        """Of these pieces alone, as they are now; one that two share is taken once."""
        found = [(i, local_tensor(grad)) for i in mine if (grad := self.grad_of(self.members[i])) is not None]
        own = list({_memory(grad): i for i, grad in reversed(found)}.values())[::-1]
        local = {i: grad for i, grad in found}
        return Grads(self.present(own, [i for i, _ in found]), GradList.of([local[i] for i in own]))

    def _met_again(self, given: list[Any], expected: _Expected) -> GradList | None:
        """None where a gradient is another tensor than at the step before, or lies elsewhere."""
        met = expected.met
        if met is None or not met.all or not all(map(is_, map(ref.__call__, met.all), given)):
            return None
        grads = _locals(given, expected)
        if list(map(_POINTER, grads)) != met.addresses or list(map(_BYTES, grads)) != met.sizes:
            return None
        return GradList(grads, expected.layout, met.pointers, expected.odd)

    def _compared(self, given: list[Any], expected: _Expected) -> GradList | None:
        """None where anything is not as expected."""
        if expected.specs:
            if list(map(type, given)) != expected.types:
                return None
            if [_SPEC(grad) for grad, kind in zip(given, expected.types) if kind is DTensor] != expected.specs:
                return None
        grads = _locals(given, expected)
        if not PLAIN.issuperset(map(type, grads)):  # a collective still fills one, or it has no memory of its own
            return None
        if list(map(_SHAPE, grads)) != expected.shapes or list(map(_DTYPE, grads)) != expected.dtypes:
            return None
        if not all(map(_CONTIGUOUS, grads)) and list(map(_STRIDES, grads)) != expected.strides:
            return None
        # the model was moved, or grad_of looks elsewhere; a process that never used CUDA has nothing to look for
        if torch.cuda.is_initialized() and set(map(_ON_CPU, grads)) != {self.device.type == "cpu"}:
            return None
        pointers = array("Q", map(_POINTER, grads))
        if len(set(pointers)) != expected.filled:  # one gradient under two parameters
            return None
        if given:
            stay = expected.met is not None and expected.met.first() is given[0]
            sizes, addresses = (list(map(_BYTES, grads)), pointers.tolist()) if stay else ([], [])
            expected.met = _Met(ref(given[0]), list(map(ref, given)) if stay else [], sizes, addresses, pointers)
        return GradList(grads, expected.layout, pointers, expected.odd)

    def _looked_at(self, grads: Sequence[Tensor | None], has: bytes) -> Grads:
        own: list[int] = []
        every: list[int] = []
        local: list[Tensor] = []
        faults: list[str] = []
        seen: set[tuple[int, ...]] = set()
        for i, (grad, piece) in enumerate(zip(grads, self.pieces, strict=True)):
            if grad is None:
                continue
            every.append(i)
            fault, tensor = _misplaced(grad, piece), local_tensor(grad)
            memory = _memory(tensor)
            if memory in seen:
                continue
            seen.add(memory)
            if fault is None and tuple(tensor.shape) != piece.local_shape:
                fault = (
                    f"the gradient of {piece.name} has local shape {tuple(tensor.shape)}, the plan says {piece.local_shape} "
                    f"({piece.holding.how}); it is not sharded or reduced yet (no_sync?): clip after the reduction, or call "
                    "clipper.rebuild() if the parameter was changed"
                )
            if fault is None:
                own.append(i)
                local.append(tensor)
            else:
                faults.append(fault)
        if not every and (hooks := _hooks(self.members, self.pieces)):
            faults.append(
                f"no parameter has a gradient, and {hooks} runs as soon as a gradient is accumulated: an optimizer that steps inside "
                "backward leaves nothing to clip, and the global norm is not known yet there; step after the clip, without this hook"
            )
        if self.grad_of is not own_grad and local and (fault := self._fleeting(every[0])):
            faults.append(fault)
        replaced = [slot.path for slot in self.slots if slot.replaced()]
        if replaced:
            faults.append(
                f"{replaced[0]} was replaced after the clipper was built ({len(replaced)} in all); call clipper.rebuild() on all ranks"
            )
        if self._present is None or self._present.own != tuple(own) or self._present.all != tuple(every):
            self._present = self.present(own, every)
        found = Grads(self._present, GradList.of(local), faults)
        if len(self._expected) >= _REMEMBERED:
            self._expected.clear()
        self._expected.pop(has, None)
        if not faults and len(own) == len(every) and (expected := self._expectation(grads, found)) is not None:
            self._expected[has] = expected
        return found

    def _fleeting(self, i: int) -> str | None:
        """What is wrong with a `grad_of` that makes a new tensor at each call."""
        first, second = self.grad_of(self.members[i]), self.grad_of(self.members[i])
        if first is None or second is None or _memory(local_tensor(first)) == _memory(local_tensor(second)):
            return None
        return (
            f"grad_of makes a new tensor for {self.pieces[i].name} at each call, so that clipping it changes nothing; return the tensor "
            "that the optimizer reads"
        )

    def present(self, own: Sequence[int], every: Sequence[int]) -> Present:
        count = len(self.members)
        has = torch.zeros(count, dtype=torch.float64, device="cpu")
        has[list(every)] = 1
        index = None if len(own) == count else torch.tensor(own, dtype=torch.int64, device="cpu").to(self.device)
        return Present(tuple(own), tuple(every), index, has.to(self.device))

    def _expectation(self, grads: Sequence[Tensor | None], found: Grads) -> _Expected | None:
        """For the next steps, if the kernel takes all of these as they are, or torch does."""
        listed = found.list
        mixed = listed.layout is not None and len(listed.odd) > 0
        if mixed or not all(is_block(tensor, self.device) for tensor in listed.tensors):
            return None
        given = [grad for grad in grads if grad is not None]
        return _Expected(
            types=list(map(type, given)),
            shapes=[tensor.shape for tensor in listed.tensors],
            strides=[tensor.stride() for tensor in listed.tensors],
            dtypes=[tensor.dtype for tensor in listed.tensors],
            specs=[_SPEC(grad) for grad in given if type(grad) is DTensor],
            layout=listed.layout,
            odd=listed.odd,
            filled=len({tensor.data_ptr() for tensor in listed.tensors}),
            present=found.present,
        )


def _locals(given: list[Any], expected: _Expected) -> list[Any]:
    """DTensors as this rank's part of them."""
    if not expected.specs:
        return given
    if len(expected.specs) == len(given):
        return list(map(_LOCAL, given))
    return [_LOCAL(grad) if kind is DTensor else grad for grad, kind in zip(given, expected.types)]


def _memory(tensor: Tensor) -> tuple[int, ...]:
    """Equal for two gradients that are the same, be they one object or two over the same memory."""
    if type(tensor) not in PLAIN or tensor.layout is not torch.strided or not tensor.numel():
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.numel())


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
