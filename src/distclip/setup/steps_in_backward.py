"""Parameters that an optimizer steps inside `backward()`: a clip comes too late for them. Sends
nothing."""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel

from distclip.errors import ConfigError
from distclip.setup.parameters import ParamScan
from distclip.torch_internals.hooks import optimizers_in_backward, steps_in_comm_hook
from distclip.torch_internals.reductions import comm_hooks_of

_STEP_AFTER = "give them to an optimizer that is stepped after backward() and the clip"


def stepped_in_backward(scan: ParamScan) -> str:
    """A text about the trainable parameters that a clip cannot reach beside others that it can, or
    nothing.

    Raises:
        ConfigError: it can reach none, or DDP steps all of its own.
    """
    for module in scan.modules:
        for path, part in module.named_modules():
            if isinstance(part, DistributedDataParallel):
                _check_comm_hooks(path, part)
    trainable = [named for named in scan.named if named.param.requires_grad]
    early = [named for named in trainable if optimizers_in_backward(named.param)]
    if not early:
        return ""
    (optimizer, *_), first = optimizers_in_backward(early[0].param), early[0].name
    seen = (
        f"{len(early)} of {len(trainable)} trainable parameters are stepped inside backward() "
        f"({first}, by {type(optimizer).__name__}), which leaves no gradient of theirs"
    )
    if len(early) == len(trainable):
        raise ConfigError(f"{seen}: there is nothing to clip; {_STEP_AFTER}")
    return (
        f"{seen}: they are neither in the norm nor clipped. If that is not meant, {_STEP_AFTER}; "
        "if it is, pass the other parameters alone"
    )


def _check_comm_hooks(path: str, module: DistributedDataParallel) -> None:
    for hook in comm_hooks_of(module):
        if steps_in_comm_hook(hook):
            raise ConfigError(
                f"the communication hook {getattr(hook, '__qualname__', hook)} of "
                f"{path or 'the model'} steps an optimizer inside backward(), before the global "
                "norm is known: its steps would not be clipped. Register a hook that only reduces, "
                "and step after the clip"
            )
