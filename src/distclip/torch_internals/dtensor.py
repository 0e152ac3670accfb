"""DTensor without importing it: torch.distributed.tensor takes a second to import, and a program that has none needs it nowhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def imported_class(module: str, name: str) -> type | None:
    """A class of torch if this program has imported its module; before that nothing can be one, and it is None."""
    return getattr(sys.modules.get(module), name, None)


def dtensor_class() -> type[DTensor] | None:
    """None where torch.distributed.tensor was not imported: no tensor is a DTensor then."""
    return imported_class("torch.distributed.tensor", "DTensor")


def is_dtensor(value: object) -> TypeIs[DTensor]:
    """`isinstance(value, DTensor)`."""
    kind = dtensor_class()
    return kind is not None and isinstance(value, kind)
