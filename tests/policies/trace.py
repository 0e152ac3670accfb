"""A recorded trace of norms, by formula: three groups of unlike scales, noise, decay, spikes, NaN,
inf, and steps without gradients."""

import math

import numpy as np

STEPS, GROUPS = 400, 3
SCALES = np.array([1e-6, 1.0, 40.0])
SPIKES_IN_ALL = (150, 151, 233, 320)
SPIKES_IN_ONE = {60: 0, 200: 1, 260: 1, 290: 2, 340: 0, 399: 2}
NOT_FINITE = {0: math.nan, 7: math.inf, 90: math.nan, 91: math.inf, 152: math.nan, 310: math.inf}
ELSEWHERE = (120, 321)  # all norms are finite, yet some gradient tensor is not
WITHOUT = {1: (1, 2, 3), 2: (130,), 0: (131, 132)}  # group: steps at which it has no gradients


def _noise(step: np.ndarray, group: np.ndarray) -> np.ndarray:
    """In [-1, 1), the same on every machine to the last bits that matter here."""
    return 2 * np.modf(np.abs(np.sin(12.9898 * step + 78.233 * group + 1) * 43758.5453))[0] - 1


def recorded() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """norms [STEPS, GROUPS], total [STEPS], finite [STEPS] bool."""
    step, group = np.meshgrid(np.arange(STEPS), np.arange(GROUPS), indexing="ij")
    norms = SCALES * (0.5 + 1.5 * np.exp(-step / 120)) * (1 + 0.15 * _noise(step, group))
    norms[list(SPIKES_IN_ALL)] *= 30
    for at, which in SPIKES_IN_ONE.items():
        norms[at, which] *= 12
    for which, at in WITHOUT.items():
        norms[list(at), which] = 0
    for at, value in NOT_FINITE.items():
        norms[at, at % GROUPS] = value
    total = np.sqrt((norms**2).sum(1))
    finite = np.isfinite(norms).all(1)
    finite[list(ELSEWHERE)] = False
    return norms, total, finite
