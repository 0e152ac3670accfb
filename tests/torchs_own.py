"""torch.distributed.optim, whose import warns of torch's own use of torch.jit.script."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import (
        PostLocalSGDOptimizer,
        ZeroRedundancyOptimizer,
        _apply_optimizer_in_backward,
    )

__all__ = ["PostLocalSGDOptimizer", "ZeroRedundancyOptimizer", "_apply_optimizer_in_backward"]
