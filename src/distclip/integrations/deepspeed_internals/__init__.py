"""All use of DeepSpeed's internals: where it keeps gradients, and where a step can be intercepted.

`engine.py` has what all kinds of engine share, `sharded.py` stages 1 to 3, `whole.py` stage 0.
"""

from typing import Any

from distclip.integrations.deepspeed_internals.engine import (
    NEEDED_OF_ENGINE,
    EngineAdapter,
    end_own_clipping,
    missing_names,
    own_clipping,
    unsupported_features,
    unsupported_sharded_features,
)
from distclip.integrations.deepspeed_internals.sharded import (
    BF16Adapter,
    ZeRO3Adapter,
    ZeRO12Adapter,
)
from distclip.integrations.deepspeed_internals.whole import (
    FusedAdapter,
    PlainAdapter,
    UnfusedAdapter,
)

ADAPTERS: dict[str, type[EngineAdapter]] = {
    "DeepSpeedZeroOptimizer": ZeRO12Adapter,
    "DeepSpeedZeroOptimizer_Stage3": ZeRO3Adapter,
    "BF16_Optimizer": BF16Adapter,
    "FP16_UnfusedOptimizer": UnfusedAdapter,
    "FP16_Optimizer": FusedAdapter,
    "plain": PlainAdapter,
}


def adapter_for(engine: Any) -> type[EngineAdapter] | None:
    if engine.optimizer is not None and engine.optimizer is engine.basic_optimizer:
        return ADAPTERS["plain"]
    return ADAPTERS.get(type(engine.optimizer).__name__)


__all__ = [
    "ADAPTERS",
    "NEEDED_OF_ENGINE",
    "EngineAdapter",
    "end_own_clipping",
    "adapter_for",
    "missing_names",
    "own_clipping",
    "unsupported_features",
    "unsupported_sharded_features",
]
