"""The float64 truth in one process. Knows nothing of distclip, meshes or ranks."""

import numpy as np
import torch

NORMS = (0.5, 1.0, 2.0, 3.0, 8.0, float("inf"))


def total_norm(grads, p=2.0) -> float:
    """The p-norm of all tensors as one vector, scaled by its maximum so that nothing over- or
    underflows."""
    parts = [
        torch.view_as_real(g).numpy() if g.is_complex() else g.to_dense().double().numpy()
        for g in grads
    ]
    flat = np.abs(np.concatenate([part.astype(np.float64).ravel() for part in parts]))
    top = flat.max()
    return (
        float(top)
        if p == float("inf") or top == 0
        else float(top * ((flat / top) ** p).sum() ** (1 / p))
    )
