"""Process groups of one test in ranks that all tests share."""

from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def ended_groups():
    """What is made within the context ends with it. A group that is only forgotten goes on polling,
    with three threads in each rank."""
    before = set(dist.distributed_c10d._world.pg_map)
    try:
        yield
    finally:
        for group in set(dist.distributed_c10d._world.pg_map) - before:
            dist.destroy_process_group(group)
