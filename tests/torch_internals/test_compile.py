"""Calls inside a compiled program run as they are, and who never compiles does not import the
compiler."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import distclip


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    net(torch.randn(5, 4)).square().sum().backward()
    yield net
    torch._dynamo.reset()


CALLS = {
    "clip_": lambda clipper, optimizer: clipper.clip_(),
    "step": lambda clipper, optimizer: clipper.step(optimizer),
    "measure": lambda clipper, optimizer: clipper.measure(),
    "decide and apply_": lambda clipper, optimizer: decide_and_apply(clipper),
    "audit": lambda clipper, optimizer: clipper.audit(),
}


def decide_and_apply(clipper):
    report = clipper.decide()
    clipper.apply_(clipper._stages.inputs.members)
    return report


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_inside_a_compiled_function(model, call):
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    clipper = distclip.GradClipper(model, 0.5)
    want = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm()
    assert want > 0.5, "vacuous"

    def program(x):
        doubled = x * 2
        report = call(clipper, optimizer)
        return doubled + 1, report

    out, report = torch.compile(program, backend="eager")(torch.ones(2))
    assert out.tolist() == [3.0, 3.0]
    after = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm()
    if call is CALLS["audit"]:
        assert report is None and after == want
        return
    assert float(report.total_norm) == pytest.approx(float(want), rel=1e-6)
    touches = call is not CALLS["measure"]
    assert float(after) == pytest.approx(0.5 if touches else float(want), rel=1e-6)


def test_a_program_that_does_not_compile_imports_no_compiler():
    program = """
import sys, torch, distclip
p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)
before = "torch._dynamo" in sys.modules
distclip.GradClipper([("p", p)], 1.0).clip_()
print(before, "torch._dynamo" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.split() == ["False", "False"], done.stderr
