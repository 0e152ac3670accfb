"""A process of its own for what depends on how triton was imported."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from kernels import triton_cases


class Elsewhere:
    """One process that stays up: the flag of triton's interpreter counts when a kernel is
    defined."""

    def __init__(self, **environment):
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), triton_cases.start)
        before = dict(os.environ)
        # of the process from its start on: importing torch may import triton already
        os.environ.update(environment)
        try:
            self.pool.submit(os.getpid).result(timeout=900)
        finally:
            os.environ.clear()
            os.environ.update(before)

    def run(self, function, *args):
        return self.pool.submit(function, *args).result(timeout=900)
