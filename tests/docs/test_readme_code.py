"""The README's code, taken from the README and run; what its comments say of Keras is checked
against Keras' own rules written out."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
import skips

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = dict(re.findall(r"<!-- run: (\w+) -->\n```python\n(.*?)```", README, re.DOTALL))


def model_with_gradients():
    model = nn.ModuleDict({"hidden": nn.Linear(3, 4), "head": nn.Linear(4, 2)})
    source = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=source) * 4
    return model


def clipped(make):
    """Gradients before and after `make(model, optimizer)` clips once."""
    model = model_with_gradients()
    before = {name: p.grad.double() for name, p in model.named_parameters()}
    make(model, torch.optim.SGD(model.parameters(), 1.0)).clip_()
    return before, {name: p.grad.double() for name, p in model.named_parameters()}


def total(grads):
    return torch.stack([g.norm() for g in grads]).norm()


def clip_by_norm(grad, c):
    return grad * min(1.0, c / float(grad.norm()))


IMPORTED, _, *LINES = BLOCKS["groups"].splitlines()
RULES = {
    "clipnorm": lambda g: {n: clip_by_norm(x, 1.0) for n, x in g.items()},
    "clipvalue": lambda g: {n: x.clamp(-0.5, 0.5) for n, x in g.items()},
    "global_clipnorm": lambda g: {
        n: x * min(1.0, 1 / float(total(g.values()))) for n, x in g.items()
    },
    "output layer": lambda g: {
        n: x
        * min(
            1.0, c / float(total([y for m, y in g.items() if m.split(".")[0] == n.split(".")[0]]))
        )
        for n, x in g.items()
        for c in [5.0 if n.startswith("head") else 1.0]
    },
    "Muon's": lambda g: {
        n: x
        if n.startswith("hidden")
        else x * min(1.0, 1 / float(total([y for m, y in g.items() if m.startswith("head")])))
        for n, x in g.items()
    },
}


def built(line, model, optimizer):
    """By a line of the block, after the block's own import."""
    names = {"model": model, "optimizer": optimizer}
    exec(IMPORTED, names)
    return eval(line, names)


@pytest.mark.filterwarnings("ignore:value clipping turned the gradient")
@pytest.mark.parametrize("what", RULES)
def test_the_lines_do_what_their_comments_say(what):
    (line,) = [line for line in LINES if re.search(rf"# .*(?<![\w_]){re.escape(what)}", line)]
    before, after = clipped(lambda model, optimizer: built(line, model, optimizer))
    want = RULES[what](before)
    for name in before:
        assert torch.allclose(after[name], want[name], rtol=1e-6, atol=1e-7), name
    assert any(not torch.equal(after[name], before[name]) for name in before), "vacuous"


def test_all_lines_run():
    assert len(LINES) == 6
    for line in LINES:
        model = model_with_gradients()
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        assert isinstance(built(line, model, optimizer), distclip.GradClipper)


@skips.told()
def test_a_policy_of_ones_own():
    names = {}
    exec(BLOCKS["policy"], names)
    assert len(BLOCKS["policy"].partition("class")[2].strip().splitlines()) <= 12
    p = nn.Parameter(torch.zeros(1))
    clipper = distclip.GradClipper([("w", p)], policy=names["TwiceTheMean"]())
    mean, seen = 0.0, []
    for size in (1.0, 1.5, float("nan"), 9.0, 1.0, 4.0):
        p.grad = torch.tensor([size])
        report = clipper.clip_()
        if size == size:
            coef = min(1.0, 2 * mean / size) if mean else 1.0
            assert report.clip_coef.item() == pytest.approx(coef, rel=1e-6)
            mean = 0.99 * mean + 0.01 * coef * size if mean else size
            seen.append(coef)
    assert min(seen) < 1, "vacuous"


def test_sinks_and_watched_layers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"model": model_with_gradients()}
    exec(BLOCKS["sinks"], names)
    names["clipper"].clip_()
    assert (tmp_path / "run.jsonl").read_text().count("\n") == 2, "a header and a step"


def start():
    """The first block, on a rank of four: what it reports beside a float64 oracle of the whole
    batch in one process."""
    rows = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(5)) * 4
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    oracle = copy.deepcopy(model).double()
    loss_fn = lambda out: out.square().mean() * 10  # noqa: E731
    names = {"model": model, "loss_fn": loss_fn, "data": [rows[0, dist.get_rank() :: 4]]}
    exec(BLOCKS["start"], names)
    loss_fn(oracle(rows[0].double())).backward()
    exact = float(torch.stack([p.grad.norm() for p in oracle.parameters()]).norm())
    return exact, float(names["report"].total_norm), bool(names["report"].clipped)


def test_the_first_block(ranks):
    for exact, told, was_clipped in ranks.run(start):
        assert exact > 1 and was_clipped, "vacuous"
        assert told == pytest.approx(exact, rel=1e-6)


def test_the_block_with_a_scaler():
    model = nn.Linear(3, 2)
    scaler, optimizer = (
        torch.amp.GradScaler("cpu", init_scale=8.0),
        torch.optim.SGD(model.parameters(), 1.0),
    )
    names = {
        "clipper": distclip.GradClipper(model, max_norm=0.5),
        "scaler": scaler,
        "optimizer": optimizer,
    }
    names |= {
        "loss": model(torch.ones(4, 3)).square().sum(),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1),
    }
    exact = float(
        torch.stack(
            [
                g.double().norm()
                for g in torch.autograd.grad(names["loss"], model.parameters(), retain_graph=True)
            ]
        ).norm()
    )
    exec(BLOCKS["scaler"], names)
    assert exact > 0.5, "vacuous"
    assert float(names["report"].total_norm) == pytest.approx(exact, rel=1e-6)
    assert optimizer.param_groups[0]["lr"] < 1.0, "the scheduler did not step"


def test_every_block_of_python_is_run():
    assert README.count("```python") == len(BLOCKS) == 5
