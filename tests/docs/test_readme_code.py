"""The README's code, taken from the README and run with only the imports that it shows: both sides of
each diff, and the blocks."""

import math

import pytest
import torch
from torch import nn

import distclip
from docs import readme
from docs.readme import BLOCKS, DIFFS, LOOPS, README
from docs.setting import gradients, loss_of, net
from parity.oracle import total_norm

FRAMEWORKS = {"accelerate", "trainer", "lightning", "deepspeed"}  # in test_migrating.py's job


@pytest.mark.parametrize("name", LOOPS)
def test_both_sides_of_a_loop_train_alike(ranks, name):
    told = ranks.run(readme.compared, name)
    for seen in told:
        assert seen["way"] > 0 and seen["clip"] > 1e-2, "vacuous"
        assert seen["apart"] < 1e-5
        assert seen["report"]["clipped"] and seen["report"]["total_norm"] > 1
    assert len({seen["norm"] for seen in told}) == 1
    reports = [seen["report"] for seen in told]
    assert all(report["total_norm"] == reports[0]["total_norm"] for report in reports)


def test_every_diff_and_every_block_is_run():
    assert set(DIFFS) == {*LOOPS, *FRAMEWORKS}
    assert README.count("```diff") == len(DIFFS)
    assert README.count("```python") == len(BLOCKS) == 3
    for name in DIFFS:
        assert "import distclip" in readme.sides(name).after
        assert "distclip" not in readme.sides(name).before


def model_after_backward():
    model = net()
    loss_of(model).backward()
    return model


def test_measuring_and_the_two_commands(tmp_path, monkeypatch, capsys):
    from distclip.cli import main

    monkeypatch.chdir(tmp_path)
    model = model_after_backward()
    names = {"model": model}
    exec(BLOCKS["measure"], names)
    before = [p.grad.clone() for p in model.parameters()]
    for _ in range(120):
        report = names["clipper"].clip_()
    assert float(report.total_norm) == pytest.approx(total_norm(gradients().values()), rel=1e-6)
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
    assert main(["suggest", "run.jsonl"]) == 0
    assert "max_norm" in capsys.readouterr().out


def test_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = model_after_backward()

    def clipper():
        return distclip.GradClipper(model, policy=distclip.AutoClip(10))

    names = {"model": model, "clipper": clipper()}
    names["clipper"].clip_()
    exec(BLOCKS["checkpoint"], names)
    fresh = clipper()
    fresh.load_state_dict(torch.load("checkpoint.pt")["clipper"])
    assert int(fresh.state_dict()["step"]) == int(names["clipper"].state_dict()["step"]) == 1


def test_a_group_with_a_threshold_of_its_own():
    model = nn.ModuleDict({"hidden": nn.Linear(3, 4), "head": nn.Linear(4, 2)})
    for p in model.parameters():
        p.grad = torch.full_like(p, 10.0)
    names = {"model": model}
    exec(BLOCKS["groups"], names)
    names["clipper"].clip_()
    for part, bound in (("head", 5.0), ("hidden", 1.0)):
        norm = math.sqrt(sum(float(p.grad.norm()) ** 2 for p in model[part].parameters()))
        assert norm == pytest.approx(bound, rel=1e-6)
