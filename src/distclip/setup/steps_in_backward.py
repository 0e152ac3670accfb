"""Parameters that an optimizer steps inside `backward()`: a clip comes too late for them. Sends
nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distclip.errors import ConfigError
from distclip.records import ParamPiece
from distclip.setup.parameters import ParamScan
from distclip.torch_internals.hooks import (
    accumulate_hooks,
    optimizers_in_backward,
    steps_in_comm_hook,
)
from distclip.torch_internals.reductions import comm_hooks_of

_STEP_AFTER = "give them to an optimizer that is stepped after backward() and the clip"
_NOT_CLIPPED = (
    f"they are neither in the norm nor clipped. If that is not meant, {_STEP_AFTER}; if it is, "
    "pass the other parameters alone"
)


def stepped_in_backward(scan: ParamScan) -> str:
    """A text about this rank's trainable parameters that a clip cannot reach, or nothing. Whether
    it reaches others, perhaps of other ranks, is for `told_of_steps` to say.

    Raises:
        ConfigError: DDP steps all of its own.
    """
    for path, part in _ddps_in(scan.modules):
        for hook in comm_hooks_of(part):
            check_comm_hook(path, hook)
    trainable = [named for named in scan.named if named.param.requires_grad]
    early = [named for named in trainable if optimizers_in_backward(named.param)]
    if not early:
        return ""
    (optimizer, *_), first = optimizers_in_backward(early[0].param), early[0].name
    return (
        f"{len(early)} of {len(trainable)} trainable parameters are stepped inside backward() "
        f"({first}, by {type(optimizer).__name__}), which leaves no gradient of theirs"
    )


def told_of_steps(seen: str, reaches_some: bool) -> str:
    """What to log of it, where there is something.

    Args:
        seen: what `stepped_in_backward` gave; empty on ranks that have no such parameter.
        reaches_some: some rank has a trainable parameter that is not stepped inside `backward()`.

    Raises:
        ConfigError: there is none.
    """
    if not reaches_some:
        seen = (
            seen or "all trainable parameters are other ranks', which step them inside backward()"
        )
        raise ConfigError(f"{seen}: there is nothing to clip; {_STEP_AFTER}")
    return seen and f"{seen}: {_NOT_CLIPPED}"


class StepsSinceSetup:
    """What began to step an optimizer inside `backward()` once the clipper was there. Such
    gradients are gone at the clip: it is asked where other gradients are there than before.

    Args:
        modules: that were passed; none where pairs or parameters were.
        members, pieces: [pieces] the parameters.
    """

    def __init__(
        self, modules: Sequence[nn.Module], members: Sequence[Tensor], pieces: Sequence[ParamPiece]
    ) -> None:
        self._ddps = _ddps_in(modules)
        self._members, self._pieces = members, pieces
        self._told = {i for i, param in enumerate(members) if optimizers_in_backward(param)}
        self._before: bytes | None = None

    def errors(self, has: bytes) -> list[str]:
        """A text where DDP steps all of its own: it takes such a hook before the first `backward()`
        alone. What other hooks step, or may step, is logged, once for each parameter.

        Args:
            has: [pieces] 1 where there is a gradient.
        """
        if has == self._before:
            return []
        self._before = has
        if 1 in has:  # else there is nothing to clip, which is an error
            self._log(
                has,
                optimizers_in_backward,
                "are stepped inside backward() since the clipper was built",
            )
            self._log(
                has,
                accumulate_hooks,
                "have no gradient and a hook that runs as soon as one is accumulated",
                "if it steps an optimizer, ",
            )
        hooks = [(path, hook) for path, part in self._ddps for hook in comm_hooks_of(part)]
        return [text for path, hook in hooks if (text := _stepping_hook(path, hook))][:1]

    def _log(
        self, has: bytes, hooks_of: Callable[[Tensor], list[Any]], seen: str, condition: str = ""
    ) -> None:
        members = self._members
        found = [
            i
            for i, there in enumerate(has)
            if not there and i not in self._told and members[i].requires_grad
            if hooks_of(members[i])
        ]
        if not found:
            return
        self._told.update(found)
        hook = hooks_of(members[found[0]])[0]
        logging.getLogger("distclip").warning(
            "GradClipper: %d of %d trainable parameters %s (%s, by %s): %s%s",
            len(found),
            sum(param.requires_grad for param in members),
            seen,
            self._pieces[found[0]].name,
            getattr(hook, "__qualname__", type(hook).__qualname__),
            condition,
            _NOT_CLIPPED,
        )


def _ddps_in(modules: Sequence[nn.Module]) -> list[tuple[str, DistributedDataParallel]]:
    return [
        (path or "the model", part)
        for module in modules
        for path, part in module.named_modules()
        if isinstance(part, DistributedDataParallel)
    ]


def check_comm_hook(where: str, hook: Callable[..., object]) -> None:
    """ConfigError for a communication hook of DDP that steps an optimizer."""
    text = _stepping_hook(where, hook)
    if text:
        raise ConfigError(text)


def _stepping_hook(where: str, hook: Callable[..., object]) -> str:
    if not steps_in_comm_hook(hook):
        return ""
    return (
        f"the communication hook {getattr(hook, '__qualname__', hook)} of {where} steps an "
        "optimizer inside backward(), before the global norm is known: its steps would not be "
        "clipped. Register a hook that only reduces, and step after the clip"
    )
