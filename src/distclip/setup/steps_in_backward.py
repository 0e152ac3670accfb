"""Parameters that an optimizer steps inside `backward()`: a clip comes too late for them. Sends
nothing."""

from __future__ import annotations

from collections.abc import Callable

from torch.nn.parallel import DistributedDataParallel

from distclip.errors import ConfigError
from distclip.setup.parameters import ParamScan
from distclip.torch_internals.hooks import optimizers_in_backward, steps_in_comm_hook
from distclip.torch_internals.reductions import comm_hooks_of

_STEP_AFTER = "give them to an optimizer that is stepped after backward() and the clip"


def stepped_in_backward(scan: ParamScan) -> str:
    """A text about this rank's trainable parameters that a clip cannot reach, or nothing. Whether
    it reaches others, perhaps of other ranks, is for `told_of_steps` to say.

    Raises:
        ConfigError: DDP steps all of its own.
    """
    for module in scan.modules:
        for path, part in module.named_modules():
            if isinstance(part, DistributedDataParallel):
                for hook in comm_hooks_of(part):
                    check_comm_hook(path or "the model", hook)
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
    return seen and (
        f"{seen}: they are neither in the norm nor clipped. If that is not meant, {_STEP_AFTER}; "
        "if it is, pass the other parameters alone"
    )


def check_comm_hook(where: str, hook: Callable[..., object]) -> None:
    """ConfigError for a communication hook of DDP that steps an optimizer."""
    if steps_in_comm_hook(hook):
        raise ConfigError(
            f"the communication hook {getattr(hook, '__qualname__', hook)} of {where} steps an "
            "optimizer inside backward(), before the global norm is known: its steps would not be "
            "clipped. Register a hook that only reduces, and step after the clip"
        )
