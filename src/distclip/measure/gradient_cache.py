"""Are a step's gradients like those of the step before? They are at most steps.

The layout of the last checked gradients is kept in lists once for each set of parameters that have
a gradient; a step then compares list with list, which costs half a microsecond a parameter, and
less where gradients are the same tensors as at the step before, at the same addresses.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from distclip import kernels, versions
from distclip.kernels.tensor_list import PLAIN, TensorList, is_block
from distclip.torch_internals.dtensor import dtensor_class, dtensor_local, dtensor_spec

_POINTER, _STRIDES, _CONTIGUOUS = Tensor.data_ptr, Tensor.stride, Tensor.is_contiguous
_SHAPE, _DTYPE = attrgetter("shape"), attrgetter("dtype")
_ON_CPU, _BYTES = attrgetter("is_cpu"), attrgetter("nbytes")
# before 2.10 a tensor that a plain weak reference gave back could lose its memory meanwhile, which
# torch warns of
TensorRef: Any = TensorWeakRef if versions.is_before(2, 10) else ref
_DEREFERENCE = TensorRef.__call__


@dataclass(slots=True)
class _LastStep:
    """The gradients of the step before, not kept alive. One that is still the same tensor, with as
    many bytes at the same address, needs no other look: what `.data =` or `resize_` can make of a
    tensor shows in one of these."""

    all: list[Callable[[], Tensor | None]]
    sizes: list[int]  # bytes
    addresses: list[int]
    pointers: array[int]  # the same, as a kernel takes them


@dataclass(slots=True)
class GradientCache:
    """What the lists of a step are compared with."""

    types: list[type]
    shapes: list[torch.Size]
    strides: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    specs: list[object]  # of the DTensors among them
    kernel_plan: kernels.KernelPlan | None
    fallback: Sequence[int]  # positions that torch computes: all, or none
    filled: int  # distinct addresses: tensors that are not empty, and one for those that are
    device: torch.device
    first: Callable[[], Tensor | None] | None = None  # of the step before, not kept alive
    # None where the first was another one at the step before it: then they are new at every step
    last: _LastStep | None = None

    @classmethod
    def from_grads(
        cls, given: Sequence[Tensor], listed: TensorList, device: torch.device
    ) -> GradientCache | None:
        """From gradients that are right, if the kernel takes all of them as they are, or torch
        does.

        Args:
            given: as they were found, DTensors among them; listed: this rank's parts of them.
        """
        mixed = listed.kernel_plan is not None and len(listed.fallback) > 0
        if mixed or not all(is_block(tensor, device) for tensor in listed.tensors):
            return None
        dtensor = dtensor_class()
        return cls(
            types=list(map(type, given)),
            shapes=[tensor.shape for tensor in listed.tensors],
            strides=[tensor.stride() for tensor in listed.tensors],
            dtypes=[tensor.dtype for tensor in listed.tensors],
            specs=[dtensor_spec(grad) for grad in given if type(grad) is dtensor],
            kernel_plan=listed.kernel_plan,
            fallback=listed.fallback,
            filled=len({tensor.data_ptr() for tensor in listed.tensors}),
            device=device,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has met no gradients yet."""
        layout = self.types, self.shapes, self.strides, self.dtypes, self.specs
        return GradientCache, (*layout, self.kernel_plan, self.fallback, self.filled, self.device)

    def match_grads(self, given: list[Any]) -> TensorList | None:
        """This rank's parts of the gradients; None where anything is not as expected, a gradient
        that is missing among it."""
        last = self.last
        try:
            if last is not None and all(map(is_, map(_DEREFERENCE, last.all), given)):
                grads = self._local_parts(given) if self.specs else given
                same_place = list(map(_POINTER, grads)) == last.addresses
                if same_place and list(map(_BYTES, grads)) == last.sizes:
                    return TensorList(grads, self.kernel_plan, last.pointers, self.fallback)
            return self._match_layout(given)
        # None, or a kind of tensor that the lists do not foresee
        except (AttributeError, RuntimeError, TypeError):
            return None

    def _match_layout(self, given: list[Any]) -> TensorList | None:
        """None where anything is not as expected."""
        if self.specs:
            if list(map(type, given)) != self.types:
                return None
            dtensor = dtensor_class()
            if [
                dtensor_spec(grad) for grad, kind in zip(given, self.types) if kind is dtensor
            ] != self.specs:
                return None
        grads = self._local_parts(given) if self.specs else given
        # a collective still fills one, or it has no memory of its own
        if not PLAIN.issuperset(map(type, grads)):
            return None
        if list(map(_SHAPE, grads)) != self.shapes or list(map(_DTYPE, grads)) != self.dtypes:
            return None
        if not all(map(_CONTIGUOUS, grads)) and list(map(_STRIDES, grads)) != self.strides:
            return None
        # the model was moved, or grad_of looks elsewhere; a process that never used CUDA has
        # nothing to look for
        if torch.cuda.is_initialized() and set(map(_ON_CPU, grads)) != {self.device.type == "cpu"}:
            return None
        pointers = array("Q", map(_POINTER, grads))
        if len(set(pointers)) != self.filled:  # one gradient under two parameters
            return None
        if given:
            if self.first is not None and self.first() is given[0]:
                self.last = _LastStep(
                    all=list(map(TensorRef, given)),
                    sizes=list(map(_BYTES, grads)),
                    addresses=pointers.tolist(),
                    pointers=pointers,
                )
            else:
                self.first, self.last = TensorRef(given[0]), None
        return TensorList(grads, self.kernel_plan, pointers, self.fallback)

    def _local_parts(self, given: list[Any]) -> list[Any]:
        """DTensors as this rank's part of them."""
        if len(self.specs) == len(given):
            return list(map(dtensor_local, given))
        dtensor = dtensor_class()
        return [
            dtensor_local(grad) if kind is dtensor else grad
            for grad, kind in zip(given, self.types)
        ]
