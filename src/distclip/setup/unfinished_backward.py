"""Modules whose gradients `backward()` may leave unfinished until `finalize_backward()` is called.
Sends nothing.

Since torch 2.15 the caller of DDP and FSDP2 may finalize gradients by hand; before it there is no
such module. Pipeline schedules do so by themselves, and have finalized all stages when their `step`
ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distclip.setup.parameters import Params, modules_in, strip_wrappers
from distclip.torch_internals.backward import fsdp2_is_unfinished, has_reduced
from distclip.torch_internals.dtensor import imported_class


class ReducingWrapper(NamedTuple):
    """A module that reduces the gradients of all that is in it."""

    name: str
    module: Any


def reducing_wrappers(params: Params) -> tuple[ReducingWrapper, ...]:
    """The outermost such modules in what the caller passed; none where parameters without modules
    were passed."""
    # before its import no module is an instance
    fsdp2 = imported_class("torch.distributed.fsdp", "FSDPModule")
    kinds = tuple(
        kind
        for kind in (DistributedDataParallel, fsdp2)
        if kind is not None and hasattr(kind, "finalize_backward")
    )
    return tuple(
        wrapper
        for module in modules_in(params)
        if kinds
        for wrapper in _outermost_wrappers(module, kinds, "", seen=set())
    )


def _outermost_wrappers(
    module: nn.Module, kinds: tuple[type, ...], path: str, seen: set[int]
) -> Iterator[ReducingWrapper]:
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, kinds):
        yield ReducingWrapper(strip_wrappers(path) or "the model", module)
        return
    for key, child in module._modules.items():
        if child is not None:
            yield from _outermost_wrappers(child, kinds, f"{path}.{key}" if path else key, seen)


def unfinished_errors(found: Sequence[ReducingWrapper]) -> list[str]:
    """One text about gradients that are not final, or nothing. Reads a flag of each module, and no
    device value."""
    late = [(name, remedy) for name, module in found if (remedy := _remedy_for(module))]
    if not late:
        return []
    name, remedy = late[0]
    more = f" ({len(late)} such modules in all)" if len(late) > 1 else ""
    return [f"the gradients of {name} are not final{more}: {remedy}"]


def _remedy_for(module: Any) -> str:
    """What to do; empty where gradients are final."""
    if isinstance(module, DistributedDataParallel):
        late = module.require_manual_backward_finalization and not has_reduced(module)
        handed_out = False
    else:
        # the root's, from the first forward pass on
        late, handed_out = fsdp2_is_unfinished(module)
    if handed_out:
        return (
            "call wait() of the handle that its finalize_backward(async_op=True) gave, before "
            "the clip"
        )
    if late:
        return (
            "it was told to wait for its finalize_backward() (manual backward finalization); call "
            "that after backward() and before the clip"
        )
    return ""
