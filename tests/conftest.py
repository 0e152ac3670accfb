"""Four gloo ranks for all tests; no test may leave a process group or an environment variable
behind."""

import gc
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch.distributed as dist

from distclip.testing import World

# more than half a minute each, the longest first: one that began last would leave a core idle
LONG = (
    "launch/test_configs.py",
    "launch/test_launchers.py",
    "integrations/test_accelerate.py",
    "precision/test_strategies.py",
    "integrations/test_transformers.py",
    "policies/test_resume.py",
    "examples/test_examples.py",
    "cli/test_doctor.py",
    "kernels/test_triton.py",
    "launch/test_strategies.py",
    "kernels/test_step_kernels.py",
    "integrations/test_lightning.py",
    "integrations/test_deepspeed.py",
    "launch/test_train.py",
    "launch/test_matrix.py",
    "test_benchmarks.py",
    "integrations/test_deepspeed_parallel.py",
    "integrations/test_torchft.py",
    "docs/test_site.py",
)


def pytest_configure(config):
    # pytest-xdist would begin with the files of the most tests, which are not the long ones
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    assert all(path.exists() for path in places), "a file of LONG was renamed"
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


def pytest_collection_finish():
    # what was imported stays: half a million objects that each garbage collection, and each
    # GradClipper in its search for DDP around its modules, would go through
    gc.collect()
    gc.freeze()


def threads():
    gc.collect()  # groups of models that hold themselves
    return len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0


@pytest.fixture(scope="session")
def all_ranks():
    with World(4) as world:
        yield world


@pytest.fixture(scope="module")
def ranks(all_ranks):
    """`ranks.run(function, *args)`: the answers of four ranks."""
    all_ranks.run(threads)  # ranks that start do so here, in no test's environment
    yield all_ranks
    # gloo polls: three threads for each group that is left; a hundred take a fifth of a core from
    # all later tests
    left = max(all_ranks.run(threads))
    if left > 40:
        all_ranks.close()  # new ranks take a fifth of a second
    assert left < 300, "process groups were left in the ranks"


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
