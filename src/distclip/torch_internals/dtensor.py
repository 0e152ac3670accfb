"""DTensor without importing it: torch.distributed.tensor takes a second to import, and a program
without DTensors does not need it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement
    from typing_extensions import TypeIs


# What a DTensor keeps, without the checks and the autograd of its public methods: a step asks each
# gradient.
dtensor_spec: Callable[[Any], Any] = attrgetter("_spec")
dtensor_local: Callable[[Any], Any] = attrgetter("_local_tensor")


def imported_class(module: str, name: str) -> type | None:
    """A class of torch if this program has imported its module; before that nothing can be one, and
    it is None."""
    return getattr(sys.modules.get(module), name, None)


def dtensor_class() -> type[DTensor] | None:
    """None where torch.distributed.tensor was not imported: no tensor is a DTensor then."""
    return imported_class("torch.distributed.tensor", "DTensor")


def is_dtensor(value: object) -> TypeIs[DTensor]:
    """`isinstance(value, DTensor)`."""
    kind = dtensor_class()
    return kind is not None and isinstance(value, kind)


def is_dtensor_class(kind: type) -> bool:
    """Whether its objects are DTensors."""
    dtensor = dtensor_class()
    return dtensor is not None and issubclass(kind, dtensor)


def local_tensor(grad: Tensor) -> Tensor:
    """The plain tensor of this rank: a DTensor's shard, waited for where a collective still fills
    it."""
    if is_dtensor(grad):
        grad = grad.to_local()
    wait = getattr(grad, "wait", None)  # AsyncCollectiveTensor
    return wait() if wait is not None else grad


def spec_of(param: Tensor) -> Any:
    """The spec of a DTensor, or what DDP keeps as that of a DTensor which it made local: `mesh`,
    `placements`, `shape`. None for any other tensor."""
    return dtensor_spec(param) if is_dtensor(param) else getattr(param, "_st_info", None)


def is_contiguous_shard(placement: Placement) -> bool:
    """Whether a rank's part is one run of indices: Shard, but no subclass of it (_StridedShard in
    some releases)."""
    kind = imported_class("torch.distributed.tensor.placement_types", "Shard")
    return kind is not None and isinstance(placement, kind)


def offset_of(shape: tuple[int, ...], spec: Any) -> tuple[int, ...]:
    """Where this rank's part of a DTensor of that shape and spec begins, by dimension."""
    # imported only once there is a DTensor: the import takes a second
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(shape, spec.mesh, spec.placements)[1])
