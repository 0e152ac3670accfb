"""The recipes' blocks, run on four gloo ranks as they stand on the page."""

import pytest

from docs import pages
from docs.blocks import blocks, marked

RECIPES = ["pipeline.md", "context_parallel.md"]
BLOCKS = [block for page in RECIPES for block in marked(page, "runs: ")]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.fixture)
def test_the_block_does_what_the_page_says(ranks, block):
    told = ranks.run(pages.run, block.fixture, block)
    assert len(set(told)) == 1, "ranks were told different norms"


def test_replica_groups_that_go_and_come_back(ranks):
    told = ranks.run(pages.replica_groups, blocks("fault_tolerance.md"))
    assert all(bits == told[0] for bits in told)


def test_what_a_forgotten_reduction_says(ranks):
    block = next(block for block in BLOCKS if block.fixture == "context_forgotten")
    assert all(
        "rank" in text and "qkv.weight" in text
        for text in ranks.run(pages.run, block.fixture, block)
    )


def test_what_undeclared_stages_of_equal_names_say(ranks):
    block = next(block for block in BLOCKS if block.fixture == "pipeline_plain_stages")
    assert all("body.weight" in text for text in ranks.run(pages.undeclared_stages, block))


@pytest.mark.parametrize("page", [*RECIPES, "fault_tolerance.md"])
def test_no_block_is_left_out(page):
    assert all(block.mark.startswith("runs: ") for block in blocks(page)) and blocks(page)
