"""The code of the site's pages: each block runs with only the imports that it shows, on four ranks or
in one process, and does what its page says. What comments say of Keras is checked against Keras' own
rules written out."""

import json
import math
import re
import runpy

import pytest
import torch
from torch import nn

import distclip
import skips
from docs import pages
from docs.blocks import DOCS, blocks, marked
from docs.setting import gradients, loss_of, net
from parity.oracle import total_norm

# tested by files of their own
ELSEWHERE = {
    "migrating.md", "comparing_with_torch.md", "pipeline.md", "context_parallel.md",
    "fault_tolerance.md", "tutorial.md",
}  # fmt: skip
PAGES = sorted(
    str(path.relative_to(DOCS))
    for path in DOCS.rglob("*.md")
    if "_build" not in path.parts and "```python" in path.read_text()
)
ALL = [block for page in PAGES if page not in ELSEWHERE for block in marked(page, "runs: ")]
ON_RANKS = [block for block in ALL if block.fixture in pages.FIXTURES]
BLOCKS = {block.fixture: block for block in ALL if block not in ON_RANKS}


def test_every_block_of_every_page_is_run():
    assert set(PAGES) >= ELSEWHERE
    for page in PAGES:
        if page != "tutorial.md":
            assert all(block.mark.partition(":")[0] in MARKS for block in blocks(page)), page
    assert set(BLOCKS) == HERE


MARKS = {"runs", "runs in a framework", "before"}
HERE = {
    "groups",
    "own_policy",
    "sinks",
    "with_scaler",
    "a_policy",
    "measuring",
    "own_sink",
    "own_framework",
    "a_world",
}


@pytest.mark.parametrize("block", ON_RANKS, ids=lambda block: f"{block.where} {block.fixture}")
def test_the_block_does_what_the_page_says(ranks, block):
    told = ranks.run(pages.run, block.fixture, block)
    assert len(set(told)) == 1, "ranks were told different norms"


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


IMPORTED, _, *LINES = BLOCKS["groups"].code.splitlines()
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
    BLOCKS["own_policy"].run(names)
    assert len(BLOCKS["own_policy"].code.partition("class")[2].strip().splitlines()) <= 12
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
    BLOCKS["sinks"].run(names)
    names["clipper"].clip_()
    assert (tmp_path / "run.jsonl").read_text().count("\n") == 2, "a header and a step"


def test_the_block_with_a_scaler():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    names = {
        "model": model,
        "loss_of": loss_of,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1),
    }
    BLOCKS["with_scaler"].run(names)
    exact = total_norm(gradients().values())
    assert exact > 1, "vacuous"
    assert float(names["report"].total_norm) == pytest.approx(exact, rel=1e-6)
    assert optimizer.param_groups[0]["lr"] < 1.0, "the scheduler did not step"


def test_a_policy_inside_wrappers():
    model = model_with_gradients()
    names = {"model": model}
    BLOCKS["a_policy"].run(names)
    assert names["clipper"].clip_().clipped
    norm = total_norm([p.grad for p in model.parameters()])
    assert norm == pytest.approx(1.0, rel=1e-6), "the warm-up's threshold"


def test_measuring(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = model_with_gradients()
    before = [p.grad.clone() for p in model.parameters()]
    names = {"model": model}
    BLOCKS["measuring"].run(names)
    names["clipper"].clip_()
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
    line = json.loads((tmp_path / "run.jsonl").read_text().splitlines()[-1])
    assert line["total_norm"] == pytest.approx(total_norm(before), rel=1e-6)


def test_a_sink_of_ones_own(capsys):
    model = model_with_gradients()
    names = {"model": model}
    BLOCKS["own_sink"].run(names)
    for factor in (0.1, 10.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, factor)
        names["clipper"].clip_()
    norm = 10 * math.sqrt(sum(p.numel() for p in model.parameters()))
    assert capsys.readouterr().out == f"step 2: norm {norm:.3g}\n"


def test_a_framework_of_ones_own():
    """Gradients lie elsewhere, scaled by 8; the clipped ones have a norm of 1 after unscaling."""
    model, scale = net(), 8.0
    loss_of(model).backward()
    for p in model.parameters():
        p.main_grad, p.grad = p.grad * scale, None
    stepped = []
    names = {"model": model, "loss_scale": scale, "step_by_hand": lambda: stepped.append(1)}
    BLOCKS["own_framework"].run(names)
    assert float(names["report"].total_norm) == pytest.approx(
        total_norm(gradients().values()), rel=1e-6
    )
    assert stepped == [1]
    assert total_norm([p.main_grad for p in model.parameters()]) == pytest.approx(1.0, rel=1e-6)


def test_a_world(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(BLOCKS["a_world"].code)
    names = runpy.run_path(str(script))  # its function; the part for a script is in docs/why's test
    assert names["norm_on_each_rank"]() == pytest.approx(math.sqrt(12), rel=1e-6)
