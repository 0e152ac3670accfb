"""Uneven data: inside torch's `join`, ranks that ran out of batches answer torch's own collectives,
and no others."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable

from distclip.errors import ConfigError


class JoinGuard:
    """Knows whether a step is taken inside `join()`, where a collective over all ranks would hang.

    Args:
        joinables: modules that can be inside it.
    """

    def __init__(self, joinables: Sequence[Joinable]) -> None:
        self._joinables = joinables
        # each one's latest context, where that is known to be over
        self._over: list[Any] = [None] * len(joinables)

    @classmethod
    def of_model(
        cls, modules: Iterable[nn.Module], params: Iterable[Tensor] = ()
    ) -> JoinGuard | None:
        """None where nothing in the model can be inside `join()`.

        Args:
            modules: that the clipper was given.
            params: its parameters, which a module that was not given (DDP around the one that was)
                may hold too. Finding such a module looks at every object, once.
        """
        every = {id(m): m for module in modules for m in module.modules()}
        mine = {id(param) for param in params}
        around: list[Any] = (
            [thing for thing in _every(Joinable) if isinstance(thing, nn.Module)] if mine else []
        )
        every |= {id(m): m for m in around if any(id(param) in mine for param in m.parameters())}
        joinables = [m for m in every.values() if isinstance(m, Joinable)]
        return cls(joinables) if joinables else None

    def refuse_join(self, operation: str) -> None:
        """ConfigError inside `join()`; on every rank that takes the step, before anything is
        sent."""
        for i, joinable in enumerate(self._joinables):
            config = joinable._join_config
            if config.enable and config is not self._over[i]:
                if _is_open(joinable):
                    raise ConfigError(
                        _REFUSAL.format(operation=operation, model=type(joinable).__name__)
                    )
                self._over[i] = config


def _is_open(joinable: Joinable) -> bool:
    """Whether the context is still open: torch leaves its config on the module afterwards. Looks at
    every object, once for each context."""
    return any(
        context._enable and any(j is joinable for j in context._joinables)
        for context in _every(Join)
    )


def _every(kind: type) -> list[Any]:
    """The objects of this kind and of what is derived from it. Types are asked first: a process has
    hundreds of thousands of objects, of few types."""
    things = gc.get_objects()
    kinds = {of for of in set(map(type, things)) if issubclass(of, kind)}
    return [thing for thing in things if type(thing) in kinds] if kinds else []


_REFUSAL = (
    "{operation}() inside {model}.join(): ranks that have run out of data take no part in it, and "
    "the others would wait for them. Give all "
    "ranks as many batches (DistributedSampler pads, or drops the rest with drop_last=True) and "
    "leave join() out. Where "
    "DistributedDataParallel alone shares the model out, every rank that is still at work holds "
    "the whole gradient, and a clipper of each "
    "rank's own serves inside join(): GradClipper(model, ..., process_group=distclip.LOCAL), with "
    "a fixed threshold, since adaptive ones "
    "learn from every step"
)
