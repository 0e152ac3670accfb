"""A kernel that reads memory and does nearly nothing else: with which bandwidth this device reads.
Imported only where triton is."""

# pyright: basic, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

_EACH, _AT_A_TIME = 65536, 8192


@triton.jit
def _sums(values, out, EACH: tl.constexpr, AT_A_TIME: tl.constexpr):
    here = values + tl.program_id(0).to(tl.int64) * EACH
    acc = tl.zeros((AT_A_TIME,), tl.float32)
    for at in range(0, EACH, AT_A_TIME):
        acc += tl.load(here + at + tl.arange(0, AT_A_TIME))
    tl.store(out + tl.program_id(0), tl.sum(acc, 0))


def reader(values: Tensor):
    """A call that reads float32 `values`, of a multiple of 65,536 elements, once."""
    programs = values.numel() // _EACH
    out = torch.empty(programs, device=values.device)
    return lambda: _sums[(programs,)](values, out, EACH=_EACH, AT_A_TIME=_AT_A_TIME, num_warps=8)
