"""The floors: ratio to the peer that a prototype reached, with torch operations alone and with the
native kernel."""

from __future__ import annotations

from typing import Any

FLOORS: dict[str, tuple[float | None, float | None]] = {
    "gpt2 fp32 idle": (2.2, 3.8),
    "gpt2 bf16 idle": (1.5, 5.0),
    "gpt2 fp32 active": (1.2, 1.6),
    "gpt2 bf16 active": (0.9, 2.0),
    "small fp32 idle": (1.8, 5.0),
    "small fp32 active": (1.1, 3.0),
    "tiny 10 idle": (None, 1 / 1.1),  # a call may cost what torch's costs
    "tiny 10 active": (None, 1 / 1.21),
    "tiny 100 idle": (None, 2.0),
    "tiny 100 active": (None, 1 / 0.55),
    "tiny 1000 idle": (None, 5.0),
    "tiny 1000 active": (None, 1 / 0.22),
    "unscale and clip": (1.7, 2.2),
    "clip and fused step, idle": (1.35, 1.5),
    "fsdp2 1000 on 4, idle": (2.7, 4.5),
    "fsdp2 1000 on 4, active": (1.8, 3.5),
    "fsdp1 1000 on 4": (None, 3.0),
    "watching ranks": (1 / 1.3, 1 / 1.3),  # at most 1.3 times one read
    "watching step": (1 / 1.1, 1 / 1.1),  # at most a tenth of a step
    "first call": (100.0, 100.0),
    "share of read bandwidth": (None, 0.85),
}
CEILINGS: dict[str, tuple[float | None, float | None]] = {
    "1,000 parameters": (3.0, 3.0),  # ms
    "10,000 groups on 4": (1.25, 1.25),  # of the time with one group
    "time a parameter, 20,000 to 1,000": (1.5, 1.5),  # linear, with room for caches
}
MEMORY = (4 * 2**20, 32)  # bytes, and bytes a tensor; native only


def floor(key: str, kernels: str) -> dict[str, Any]:
    """`Row`'s fields for a floor that was set; elsewhere no case may be slower than its peer."""
    found = FLOORS[key][kernels == "native"] if key in FLOORS else None
    return {"floor": 1.0, "issue": False} if found is None else {"floor": found, "issue": True}


def ceiling(key: str, kernels: str) -> dict[str, Any]:
    found = CEILINGS[key][kernels == "native"]
    return {"floor": found, "issue": found is not None, "at_least": False}


GPU_FLOORS: dict[str, float] = {
    "llama idle": 2.7,
    "llama idle, Automodel": 1.2,
    "llama idle, share": 0.9,
    "llama active, share": 0.88,
    "small 5,000 idle": 3.0,
    "small 5,000 active": 2.0,
    "scaler": 1.5,
    "step idle": 1.2,
}
# the host's in microseconds, for 1,000 tensors
GPU_CEILINGS: dict[str, float] = {"waits": 0, "launches": 12, "host": 150.0}
GPU_MEMORY = (2**20, 16)  # bytes, and bytes a tensor


def gpu_floor(key: str) -> dict[str, Any]:
    """As `floor`: what was set for a GPU, elsewhere no slower than the peer."""
    found = GPU_FLOORS.get(key)
    return {"floor": 1.0, "issue": False} if found is None else {"floor": found, "issue": True}


def gpu_ceiling(key: str) -> dict[str, Any]:
    return {"floor": float(GPU_CEILINGS[key]), "issue": True, "at_least": False}
