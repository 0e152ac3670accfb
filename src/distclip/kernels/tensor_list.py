"""This rank's gradient tensors as one list, which a kernel reads and writes in one call;
what it does not know, torch does."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from distclip import kernels
from distclip.kernels import KernelPlan, reference

# others may have no memory of their own, or not yet
PLAIN = frozenset({Tensor, torch.nn.Parameter})
_DTYPE, _DEVICE, _LAYOUT, _ON_CPU = (
    attrgetter("dtype"),
    attrgetter("device"),
    attrgetter("layout"),
    attrgetter("is_cpu"),
)

# Tells autograd what a kernel wrote: a graph that saved one of these (create_graph=True) must not
# be used any more.
_increment_version = torch.autograd.graph.increment_version


class TensorList:
    """Local tensors (no DTensors) and how they are computed with. All results are float64, on the
    first tensor's device.

    Args:
        tensors: [n].
        kernel_plan: the kernel's preparation for these sizes and dtypes, or None.
        pointers: [n] addresses for it; 0 where torch is to do it.
        fallback: positions that torch does.
    """

    __slots__ = ("fallback", "kernel_plan", "pointers", "tensors")

    def __init__(
        self,
        tensors: Sequence[Tensor],
        kernel_plan: KernelPlan | None,
        pointers: array[int],
        fallback: Sequence[int],
    ) -> None:
        self.tensors, self.kernel_plan, self.pointers, self.fallback = (
            tensors,
            kernel_plan,
            pointers,
            fallback,
        )

    @classmethod
    def of(
        cls,
        tensors: Sequence[Tensor],
        dtypes: tuple[torch.dtype, ...] | None = None,
        on_cpu: bool = False,
    ) -> TensorList:
        """Of any tensors: those that are one dense block of memory of a dtype that the kernel knows
        are left to it.

        Args:
            dtypes: of the tensors, where they are at hand.
            on_cpu: all are known to be there.
        """
        if not tensors:
            return cls((), None, array("Q"), ())
        home = tensors[0].device
        if dtypes is None:
            dtypes = tuple(map(_DTYPE, tensors))
        fallback = (
            []
            if _plain(tensors, set(dtypes), home, on_cpu)
            else [i for i, tensor in enumerate(tensors) if not is_block(tensor, home)]
        )
        left = set(fallback)
        counts = (
            tuple(map(Tensor.numel, tensors))
            if not fallback
            else tuple(0 if i in left else t.numel() for i, t in enumerate(tensors))
        )
        if fallback:
            dtypes = tuple(torch.float32 if i in left else d for i, d in enumerate(dtypes))
        kernel_plan = kernels.plan_for(counts, dtypes, home)
        if kernel_plan is None:
            return cls(tensors, None, array("Q"), range(len(tensors)))
        pointers = array(
            "Q",
            map(Tensor.data_ptr, tensors)
            if not fallback
            else (0 if i in left else t.data_ptr() for i, t in enumerate(tensors)),
        )
        return cls(tensors, kernel_plan, pointers, fallback)

    def power_sums(self, p: float, out: Tensor | None = None) -> Tensor:
        """[n]: sum |g|^p of each tensor, max |g| where p is inf. Not finite where an element is
        not; never communicates.

        Args:
            out: memory that a kernel may put the answer into; contiguous float64 [n] there.
        """
        if self.kernel_plan is None:
            return reference.power_sums(self.tensors, p)
        sums = self.kernel_plan.power_sums(self.pointers, p, out)
        if self.fallback:
            self._put(sums, reference.power_sums(self._fallback_tensors(), p))
        return sums

    def clamped_sums(self, values: Tensor, p: float) -> Tensor:
        """[n, 6]: see `reference.clamped_sums`. `values`: float64 [n]."""
        if self.kernel_plan is None:
            return reference.clamped_sums(self.tensors, values, p)
        sums = self.kernel_plan.clamped_sums(self.pointers, values, p)
        if self.fallback:
            self._put(sums, reference.clamped_sums(self._fallback_tensors(), self._at(values), p))
        return sums

    def scale_(self, factors: float | Sequence[float] | Tensor) -> None:
        """Multiply in place, all alike or each by its own; what is multiplied by 1 is not written.

        Args:
            factors: a number, [n] numbers, or float64 [n] on the device: then nothing is read on
                the host.
        """
        alike = isinstance(factors, (int, float))
        if alike and factors == 1.0:
            return
        if self.kernel_plan is not None:
            if isinstance(factors, (int, float, Tensor)):
                self.kernel_plan.scale_(self.pointers, factors)
                _increment_version(self.tensors)
            else:
                self.kernel_plan.scale_(
                    self.pointers, torch.tensor(factors, dtype=torch.float64, device="cpu")
                )
                _increment_version(
                    [
                        tensor
                        for tensor, factor in zip(self.tensors, factors, strict=True)
                        if factor != 1
                    ]
                )
        if self.fallback:
            if alike:
                own: Sequence[float] | Tensor = [float(factors)] * len(self.fallback)
            else:
                own = (
                    self._at(factors)
                    if isinstance(factors, Tensor)
                    else [factors[i] for i in self.fallback]
                )
            reference.scale_(self._fallback_tensors(), own)

    def clamp_(self, values: Tensor) -> None:
        """Clamp in place to [-value, value]; NaN stays. `values`: float64 [n]."""
        if self.kernel_plan is not None:
            self.kernel_plan.clamp_(self.pointers, values)
            _increment_version(self.tensors)
        if self.fallback:
            reference.clamp_(self._fallback_tensors(), self._at(values))

    def _fallback_tensors(self) -> Sequence[Tensor]:
        return (
            self.tensors
            if len(self.fallback) == len(self.tensors)
            else [self.tensors[i] for i in self.fallback]
        )

    def _at(self, values: Tensor) -> Tensor:
        """Those of the fallback ones, without an index, which would have to be sent."""
        return (
            values
            if len(self.fallback) == len(self.tensors)
            else torch.stack([values[i] for i in self.fallback])
        )

    def _put(self, sums: Tensor, fallback: Tensor) -> None:
        for i, value in zip(self.fallback, fallback.to(sums.device).unbind(), strict=True):
            sums[i] = value


def _plain(
    tensors: Sequence[Tensor], dtypes: set[torch.dtype], home: torch.device, on_cpu: bool
) -> bool:
    """Whether all are contiguous real tensors on `home`; told in a fraction of the time that one by
    one takes."""
    if not PLAIN.issuperset(map(type, tensors)) or {torch.strided} != set(map(_LAYOUT, tensors)):
        return False
    real = not any(dtype.is_complex for dtype in dtypes)
    here = on_cpu or (
        all(map(_ON_CPU, tensors)) if home.type == "cpu" else set(map(_DEVICE, tensors)) == {home}
    )
    return real and here and all(map(Tensor.is_contiguous, tensors))


def is_block(tensor: Tensor, home: torch.device) -> bool:
    """Whether the tensor's elements fill one block of memory at its address, in any order, on
    `home`."""
    if (
        type(tensor) not in PLAIN
        or tensor.layout is not torch.strided
        or tensor.device != home
        or tensor.is_complex()
    ):
        return False
    if tensor.is_contiguous():
        return True
    return tensor.permute(
        sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    ).is_contiguous()
