"""Each *After* of the migration guide, taken out of the page and run: in four gloo ranks, or with
its framework in a job of its own, where the README's diffs for frameworks run too."""

import ast
from importlib.util import find_spec

import pytest

from docs import pages
from docs.blocks import blocks, marked
from integrations.launched import launched

PAGE = "migrating.md"
BLOCKS = marked(PAGE, "runs: ")
FRAMEWORKS = {"deepspeed", "accelerate", "trainer", "lightning", "fabric"}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.where)
def test_the_block_does_what_the_page_says(ranks, block):
    told = ranks.run(pages.run, block.fixture, block)
    assert len(set(told)) == 1, "ranks were told different norms"


def test_the_blocks_inside_frameworks_and_the_readmes_diffs():
    for name in ("accelerate", "deepspeed", "lightning", "transformers"):
        if find_spec(name) is None:  # importing them changes the environment
            pytest.skip(f"{name} is not installed")
    (seen,) = launched("../docs/in_frameworks.py", ranks=1)
    assert set(seen["diffs"]) == {"accelerate", "trainer", "lightning", "deepspeed"}
    for name, sides in seen["diffs"].items():
        assert sides["way"] > 0 and sides["clip"] > 10 * sides["apart"], f"{name}: vacuous"
        assert sides["apart"] < 1e-4, name
    seen = seen["blocks"]
    assert (
        set(seen)
        == FRAMEWORKS
        == {block.fixture for block in marked(PAGE, "runs in a framework: ")}
    )
    for step in seen.values():
        assert step["wanted"] > 1, "vacuous"
        assert step["norm"] == pytest.approx(step["wanted"], rel=1e-6)
        assert step["length"] == pytest.approx(1.0, rel=1e-6)


def test_every_block_is_run_or_marked_as_before():
    marks = [block.mark.partition(":")[0] for block in blocks(PAGE)]
    assert set(marks) == {"before", "runs", "runs in a framework"}


def test_before_is_python_and_every_half_is_short():
    for block in blocks(PAGE):
        ast.parse(block.code)
        assert 2 <= len(block.code.splitlines()) <= 11, block.where
