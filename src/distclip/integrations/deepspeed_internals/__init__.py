"""What stands of DeepSpeed's inside in distclip, all of it: where gradients are, and where a step
lets a clipper in.

`engine.py` has what all kinds of engine share, `sharded.py` stages 1 to 3, `whole.py` stage 0.
"""

from typing import Any

from distclip.integrations.deepspeed_internals.engine import (
    OF_ENGINE,
    EngineAdapter,
    end_own_clipping,
    missing,
    own_clipping,
    unsupported,
)
from distclip.integrations.deepspeed_internals.sharded import BF16, ZeRO3, ZeRO12
from distclip.integrations.deepspeed_internals.whole import Fused, Plain, Unfused

KINDS: dict[str, type[EngineAdapter]] = {
    "DeepSpeedZeroOptimizer": ZeRO12,
    "DeepSpeedZeroOptimizer_Stage3": ZeRO3,
    "BF16_Optimizer": BF16,
    "FP16_UnfusedOptimizer": Unfused,
    "FP16_Optimizer": Fused,
    "plain": Plain,
}


def kind_of(engine: Any) -> type[EngineAdapter] | None:
    if engine.optimizer is not None and engine.optimizer is engine.basic_optimizer:
        return KINDS["plain"]
    return KINDS.get(type(engine.optimizer).__name__)


__all__ = [
    "KINDS",
    "OF_ENGINE",
    "EngineAdapter",
    "end_own_clipping",
    "kind_of",
    "missing",
    "own_clipping",
    "unsupported",
]
