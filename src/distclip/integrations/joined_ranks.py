"""Frameworks whose mesh has all ranks of the job, and that say so."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def join_all_ranks(options: dict[str, Any]) -> dict[str, Any]:
    """Options for `GradClipper` where all ranks work on the same modules, although no parameter may
    say so: FSDP2 over the data-parallel dimension of a mesh whose tensor-parallel dimension no
    plan uses looks as one job for each of its ranks, or as pipeline stages of equal names. What the
    caller declared stays as it is."""
    if "replicated_over" in options or "process_group" in options or not dist.is_initialized():
        return options
    return options | {"replicated_over": {"*": dist.group.WORLD}}
