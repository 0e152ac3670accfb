"""Processes of their own for triton: one that interprets, one that compiles."""

import pytest

from kernels.elsewhere import Elsewhere


@pytest.fixture(scope="module")
def interpreted():
    elsewhere = Elsewhere(TRITON_INTERPRET="1")
    yield elsewhere
    elsewhere.pool.shutdown()


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    elsewhere = Elsewhere(
        TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton"))
    )
    yield elsewhere
    elsewhere.pool.shutdown()
