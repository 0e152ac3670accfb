"""Four gloo ranks for all tests; no test may leave a process group or an environment variable behind."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch.distributed as dist

from distclip.testing import World


@pytest.fixture(scope="session")
def ranks():
    """`ranks.run(function, *args)`: the answers of four ranks."""
    with World(4) as world:
        yield world


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = dict(os.environ)
    yield
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    before.pop("PYTEST_CURRENT_TEST", None)
    assert dict(os.environ) == before
    assert not dist.is_initialized()
