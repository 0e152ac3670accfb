"""Numbers of a step: Python's floats and bools, or torch's tensors, by the same rules.

A step's handful of numbers is read once and then is plain arithmetic (`HostNow` in `step`: on the
CPU, and on CUDA for much of what the host must know at once), or everything stays on the device
(`DeviceLate`). A rule is written once (the default ones again as a kernel of the device, which
tests hold to the same bits), with Python's operators where these mean the same for both
(`flag ^ True` is "not": `~` of Python's bool is a number), and with the functions below where they
do not. A column holds one number for each group: a list of floats, or a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from operator import eq, mul
from typing import Any, TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = "float | Tensor"  # [] float64
Flag: TypeAlias = "bool | Tensor"  # [] bool
Column: TypeAlias = "list[float] | Tensor"  # [groups] float64
FlagColumn: TypeAlias = "list[bool] | Tensor"  # [groups] bool


def select(flag: Flag, one: Number, other: Number) -> Number:
    """`one` where `flag` is true, else `other`: never a product, in which NaN times 0 is NaN."""
    return torch.where(flag, one, other) if isinstance(flag, Tensor) else one if flag else other


def select_column(flag: Flag, one: Column | float, other: Column | float) -> Column:
    """The same for whole columns, or a number that fills one. One of the two is a column."""
    if isinstance(flag, Tensor):
        return torch.where(flag, _operand(one), _operand(other))
    chosen, like = (one, other) if flag else (other, one)
    if isinstance(chosen, (list, Tensor)):
        return chosen
    assert isinstance(like, (list, Tensor))
    return fill(like, chosen)


def fill(like: Column, value: float) -> Column:
    """A column of one value."""
    return torch.full_like(like, value) if isinstance(like, Tensor) else [value] * len(like)


def multiply(column: Column, other: Column | float) -> Column:
    """Entry by entry, or each by one number."""
    if isinstance(column, Tensor):
        return column * _operand(other)
    others: Any = other if isinstance(other, (list, Tensor)) else repeat(other)
    return list(map(mul, column, others))


def each(function: Callable[[Any], Any], column: Column) -> Column:
    """A function of numbers, of each entry; of a tensor at once."""
    return function(column) if isinstance(column, Tensor) else list(map(function, column))


def any_of(column: FlagColumn) -> Flag:
    """Whether some entry is true."""
    if isinstance(column, Tensor):
        return column.reshape(()) if column.numel() == 1 else column.any()
    return any(column)


def same_products(one: Column, by: Column | float, other: Column, times: Column | float) -> Flag:
    """Whether `one` · `by` = `other` · `times`, entry by entry. NaN equals nothing."""
    if isinstance(one, Tensor):
        return (one * _operand(by)).eq(_operand(other) * _operand(times)).all()
    mine: Any = by if isinstance(by, list) else repeat(by)
    theirs: Any = times if isinstance(times, list) else repeat(times)
    return all(map(eq, map(mul, one, mine), map(mul, other, theirs)))


def sum_of(column: Column) -> Number:
    """Of the entries."""
    return column.sum() if isinstance(column, Tensor) else sum(column)


def largest_of(column: Column) -> Number:
    """Of the entries, which are not NaN."""
    return column.amax() if isinstance(column, Tensor) else max(column)


def smallest_of(column: Column) -> Number:
    """Of the entries, NaN if one is."""
    if isinstance(column, Tensor):
        return column.amin()
    return next((value for value in column if value != value), min(column))


def as_tensor(column: Sequence[Any] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The column as a tensor on `device`."""
    if isinstance(column, Tensor):
        return column
    return torch.tensor(column, dtype=dtype, device=device)


def as_column(tensor: Tensor, on_host: bool) -> Any:
    """A tensor's entries as Python numbers, where rules run over these."""
    return tensor.tolist() if on_host else tensor


def _operand(value: Any) -> Any:
    return torch.tensor(value) if isinstance(value, list) else value
