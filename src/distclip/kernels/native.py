"""Gradients through the compiled kernels: one call for a whole list of tensors of mixed dtypes.

Everything that does not depend on the step is prepared in a `KernelPlan`. A call then takes
addresses, and reads or writes each gradient once; ctypes releases the GIL meanwhile. Nothing here
communicates. Results do not depend on the number of threads: a tensor is split into blocks of 2^16
elements, whose partial sums are added in order.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distclip.kernels.pool import POOL

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # as in clip.c
SUMS, CLAMPED_SUMS, SCALE, CLAMP = range(4)  # as in clip.c
COLUMNS = 6


@functools.lru_cache(maxsize=1)
def load_library() -> ctypes.CDLL | str:
    """The compiled library, or why there is none."""
    # not above: `python -m` would find it imported already, and warn
    from distclip.kernels.build import library_name

    folder = Path(__file__).parent
    try:
        path = folder / library_name()
        if not path.exists():
            stale = any(folder.glob("libdistclip-*.so"))
            return (
                "the compiled library is of other sources than these: run python -m "
                "distclip.kernels.build"
                if stale
                else "no compiled library"
            )
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the compiled library cannot be loaded: {error}"
    address, whole = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("choose", whole, (whole,)),
        ("cut", whole, (whole, address, address, address, address)),
        ("job_size", whole, ()),
        ("bind", None, (address, whole, address, address, whole, address, address)),
        ("open", whole, (address, whole, ctypes.c_double, address, address, whole, address)),
        ("help", None, (address,)),
        ("close", None, (address,)),
        ("weigh", None, (whole, whole, address, address, address)),
    ):
        function = getattr(lib, f"distclip_{name}")
        function.restype, function.argtypes = result, arguments
    lib.distclip_choose(2)  # the best that the machine has
    return lib


class _NativeCall:
    """The C side's record of one call at a time, with its partial results."""

    def __init__(self, lib: ctypes.CDLL, plan: KernelPlan) -> None:
        self._memory = ctypes.create_string_buffer(lib.distclip_job_size())
        self._parts = (ctypes.c_double * (COLUMNS * plan.parts))()
        self._tables = plan.tables  # the C side points into them
        self.address = ctypes.addressof(self._memory)
        self._help = lib.distclip_help
        self.help_address = ctypes.cast(lib.distclip_help, ctypes.c_void_p).value or 0
        counts, dtypes, starts = (ctypes.addressof(table) for table in plan.tables)
        lib.distclip_bind(
            self.address,
            plan.tensors,
            counts,
            dtypes,
            plan.chunks,
            starts,
            ctypes.addressof(self._parts),
        )

    def run_share(self) -> None:
        self._help(self.address)


class KernelPlan:
    """Sizes and dtypes of a list of gradients, prepared once. Calls may come from several threads
    at once.

    Every call takes `pointers`, one address a tensor: `tensor.data_ptr()` of a dense tensor on the
    CPU with that many elements, or 0 for "no gradient". They are best kept in an `array("Q")`.
    Addresses are not checked.

    Args:
        counts: Elements of each tensor.
        dtypes: Of each: float32, float64, bfloat16 or float16.
    """

    def __init__(self, counts: Sequence[int], dtypes: Sequence[torch.dtype]) -> None:
        lib = load_library()
        if isinstance(lib, str):
            raise RuntimeError(f"the native kernels are not there: {lib}")
        self._lib, self._given = lib, (tuple(counts), tuple(dtypes))
        self.tensors = len(counts)
        sizes = (ctypes.c_int64 * self.tensors)(*counts)
        codes = (ctypes.c_uint8 * self.tensors)(*[CODES[dtype] for dtype in dtypes])
        parts = ctypes.c_int64()
        cut = functools.partial(
            lib.distclip_cut, self.tensors, ctypes.addressof(sizes), ctypes.addressof(codes)
        )
        self.chunks: int = cut(None, ctypes.addressof(parts))
        starts = (ctypes.c_int64 * (3 * (self.chunks + 1)))()
        cut(ctypes.addressof(starts), ctypes.addressof(parts))
        self.parts = parts.value
        self.tables = (sizes, codes, starts)
        self._jobs: list[_NativeCall] = []  # idle ones: append and pop are atomic

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is prepared anew."""
        return plan_for, self._given

    def power_sums(self, pointers: Sequence[int], p: float, out: Tensor | None = None) -> Tensor:
        """Return sum |g|^p of each tensor, or max |g| where `p` is inf: float64 [n] on the CPU.

        An inf or NaN makes its sum non-finite; no elements and no gradient give 0. float64
        gradients overflow where torch's do.

        Args:
            out: such a tensor, contiguous, that is filled and returned.
        """
        if out is None:
            out = torch.empty(self.tensors, dtype=torch.float64, device="cpu")
        self._run_operation(SUMS, pointers, p, None, out)
        return out

    def clamped_sums(self, pointers: Sequence[int], values: Tensor, p: float) -> Tensor:
        """Compare each tensor with itself clamped to [-v, v], in one pass: float64 [n, 6] on the
        CPU.

        Columns: sum |g|^p, sum |c|^p (maxima where `p` is inf), sum g², sum c², sum g·c, and how
        many |g| > v. c is not rounded to the gradient's dtype. The cosine between both is column 4
        over the root of columns 2 times 3.

        Args:
            pointers: Addresses, as above.
            values: v >= 0: float64 [n], or 0-dim for all. Rounded to float32 unless the gradient is
                float64; inf clamps nothing.
            p: Order of the first two columns.
        """
        out = torch.empty(self.tensors, COLUMNS, dtype=torch.float64, device="cpu")
        self._run_operation(CLAMPED_SUMS, pointers, p, values, out)
        return out

    def scale_(self, pointers: Sequence[int], factors: Tensor | float) -> None:
        """Multiply each tensor in place, in float32 (float64 if it is), with one rounding to its
        dtype, as torch does.

        Args:
            pointers: Addresses, as above.
            factors: float64 [n] on the CPU, or one for all. A tensor whose factor is 1 is not
                touched.
        """
        self._run_operation(SCALE, pointers, 2.0, factors, None)

    def clamp_(self, pointers: Sequence[int], values: Tensor | float) -> None:
        """Clamp each tensor to [-v, v] in place; NaN stays. `values`: as in `clamped_sums`; inf
        leaves a tensor untouched."""
        self._run_operation(CLAMP, pointers, 2.0, values, None)

    def _run_operation(
        self,
        operation: int,
        pointers: Sequence[int],
        p: float,
        values: Tensor | float | None,
        out: Tensor | None,
    ) -> None:
        if not isinstance(pointers, array) or pointers.typecode != "Q":
            pointers = array("Q", pointers)
        if len(pointers) != self.tensors:
            raise ValueError(
                f"{len(pointers)} addresses came for a layout of {self.tensors} tensors"
            )
        value_address: int | None = None
        is_many = False
        if isinstance(values, Tensor):
            held = self._as_float64(values)
            value_address, is_many = held.data_ptr(), held.ndim > 0
        elif values is not None:
            held = ctypes.c_double(values)
            value_address = ctypes.addressof(held)
        try:
            job = self._jobs.pop()
        except IndexError:
            job = _NativeCall(self._lib, self)
        wants_help = self._lib.distclip_open(
            job.address,
            operation,
            p,
            pointers.buffer_info()[0],
            value_address,
            int(is_many),
            None if out is None else out.data_ptr(),
        )
        if wants_help:
            try:
                helpers = min(torch.get_num_threads(), self.chunks) - 1
                if helpers:
                    POOL.request_help(helpers, job)
            # helpers may be at work in the gradients' memory: wait for them, whatever happened
            finally:
                self._lib.distclip_close(job.address)
        self._jobs.append(job)

    def _as_float64(self, values: Tensor) -> Tensor:
        given = values.detach().to("cpu", torch.float64)
        if given.ndim and given.shape != (self.tensors,):
            raise ValueError(
                f"values of shape {tuple(given.shape)} came for {self.tensors} "
                f"tensors; give one each, or one for all"
            )
        return given.contiguous()


class WeightedSums:
    """Rows of weights, for vectors of the host: their products as Python's floats. Calls may come
    from several threads at once.

    Args:
        weights: float64 [rows, n] on the CPU.
        is_native: the compiled library is there and multiplies; else torch does.
    """

    def __init__(self, weights: Tensor, is_native: bool) -> None:
        self._weights = weights.contiguous()
        rows, count = weights.shape
        self._products = ctypes.c_double * rows
        self._args = rows, count, self._weights.data_ptr()
        lib = load_library()
        self._weigh = lib.distclip_weigh if is_native and not isinstance(lib, str) else None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has memory of its own."""
        return WeightedSums, (self._weights, self._weigh is not None)

    def select(self, columns: Tensor) -> WeightedSums:
        """For vectors of these entries alone. `columns`: int64 on the CPU."""
        return WeightedSums(self._weights[:, columns], self._weigh is not None)

    def of(self, values: Tensor) -> list[float]:
        """[rows]: Σ weight · value, in float64. `values`: contiguous float64 [n] on the CPU."""
        if self._weigh is None:
            return torch.mv(self._weights, values).tolist()
        out = self._products()
        self._weigh(*self._args, values.data_ptr(), ctypes.addressof(out))
        return out[:]


@functools.lru_cache(maxsize=64)
def plan_for(counts: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> KernelPlan:
    """The `KernelPlan` of these sizes and dtypes, prepared once."""
    return KernelPlan(counts, dtypes)
