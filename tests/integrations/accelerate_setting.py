"""Accelerate on the CPU, as the scripts beside it set it up."""

import os

from accelerate.state import PartialState
from accelerate.utils import DistributedType


def as_on_gpus():
    """Accelerate shards on accelerators only."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._reset_state()
    PartialState(backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
