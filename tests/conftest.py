"""Four gloo ranks for all tests; no test may leave a process group or an environment variable
behind."""

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
    def environment():
        return {
            k: v
            for k, v in os.environ.items()
            # set by pytest and torch, and by libraries that frameworks import
            if k not in ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR")
            and not k.startswith("KMP_")
        }

    before = environment()
    yield
    assert environment() == before
    assert not dist.is_initialized()


@pytest.fixture
def of_frameworks(monkeypatch):
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # which importing Lightning sets
