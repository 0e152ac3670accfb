"""A plugin for pytest: `TRITON_INTERPRET=1 pytest -p interpreted FILES` has the kernels of a step's
numbers compute on the CPU, under triton's interpreter, wherever a test lets the CPU stand in for a
device. In a process of its own: the flag counts when a kernel is defined.
"""

import functools
import os

import numpy as np

from distclip.decide import fixed_on_device, state
from distclip.exchange import message
from kernels import triton_cases

LAUNCHED: list[str] = []  # names of the programs


@functools.cache
def begin():
    assert os.environ.get("TRITON_INTERPRET") == "1"
    from distclip.kernels.triton_launch import KernelLauncher

    run = KernelLauncher.run

    def counted(self, program, *args):
        LAUNCHED.append(program.fn.__name__)
        return run(self, program, *args)

    KernelLauncher.run = counted
    for file in (message, fixed_on_device, state):  # which ask for these kernels
        file.kernels_for = lambda dtypes, device: "triton"
    np.seterr(all="ignore")  # inf - inf is NaN, as it is meant


def pytest_configure(config):
    triton_cases.start()
    begin()


def pytest_terminal_summary(terminalreporter):
    counts = ", ".join(f"{name} {LAUNCHED.count(name)}" for name in sorted(set(LAUNCHED)))
    terminalreporter.write_line(f"launched: {counts}")
