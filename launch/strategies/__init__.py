"""How the model is spread over the ranks: one function a strategy, in files by kind. A new one is a
function and a line of the table."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import nn

from refusal import Refused
from strategies.spread import Spread

TORCH = {
    "single": "replicated", "ddp": "replicated", "fsdp1": "sharded", "fsdp2": "sharded", "hsdp": "sharded",
    "tp": "tensor", "tp_fsdp2": "tensor", "pp": "pipeline",
}  # fmt: skip
# these own a part of the step: see jobs/
OF_FRAMEWORKS = {"accelerate": "accelerated", "deepspeed": "engine"}
NAMES = (*TORCH, *OF_FRAMEWORKS)


def check(name: str, model: str, launched: bool) -> None:
    """Refused for a strategy that is not there, or that cannot run what it is given."""
    if name not in NAMES:
        raise Refused(f"strategy: {name!r} is not known; it is one of {', '.join(NAMES)}")
    if name in ("tp", "tp_fsdp2", "pp") and model != "gpt":
        raise Refused(
            f"strategy: {name!r} splits a GPT's blocks, and model={model!r} has none; use model: "
            f"gpt, or strategy ddp, fsdp2 or hsdp"
        )
    if not launched and name != "single":
        script = "torchrun" if name in TORCH else name
        raise Refused(
            f"strategy: {name!r} needs a launcher: launch/{script}.sh ..., see the head "
            f"of that file"
        )


def spread_model(name: str, model: nn.Module, precision: str, device: str) -> Spread:
    spread: Callable[[nn.Module, str, str], Spread] = getattr(
        import_module(f"strategies.{TORCH[name]}"), name
    )
    return spread(model, precision, device)
