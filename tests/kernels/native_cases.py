"""What the tests of the native kernels share: addresses, an oracle, and hard numbers."""

import math
from array import array

import torch

from distclip.kernels.native import CODES, KernelPlan, load_library

DTYPES = list(CODES)
NORMS = [0.5, 1.0, 2.0, 2.5, 3.0, 7.0, 8.0, math.inf]
BLOCK = 1 << 16
NO_LIBRARY = isinstance(load_library(), str)


def addresses(tensors):
    return array("Q", [tensor.data_ptr() for tensor in tensors])


def layout_of(tensors):
    return KernelPlan([tensor.numel() for tensor in tensors], [tensor.dtype for tensor in tensors])


def power_sum(tensor, p):
    """In float64, by torch's operations on a widened copy."""
    size = tensor.double().abs()
    if p == math.inf:
        return size.max().item() if size.numel() else 0.0
    return (size * size if p == 2 else size.pow(p)).sum().item()


def randn(count, dtype, seed=0, offset=0):
    """`count` normal numbers that start `offset` elements into their storage."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(count + offset, generator=source).to(dtype)[offset:]
