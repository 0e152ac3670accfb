"""Which torch was run: said once where it was none of them, as a note that ends no program."""

import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

import distclip
from distclip import versions

RUN = ", ".join(release.rpartition(".")[0] for release in versions.RUN)


@pytest.mark.parametrize(
    "release", [*versions.RUN, "2.13.1", "2.13.0a0+git1234567", f"{versions.RUN[0]}+cu128"]
)
def test_a_series_that_was_run(release):
    assert versions.untested_release_note(release) == ""


@pytest.mark.parametrize(
    "release", ["2.1.0", "2.7.1", "2.10.0+cu128", "2.99.0.dev20270101", "3.0.0"]
)
def test_a_series_that_was_not_run(release):
    assert versions.untested_release_note(release) == (
        f"distclip's tests were run with torch {RUN}, and not with {release}. It is likely to "
        f"work: `distclip doctor` checks it on this "
        "machine, launch/matrix.sh runs the tests"
    )


def test_older_than(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    assert [
        versions.is_before(*series) for series in ((2, 9), (2, 10), (2, 11), (3, 0), (1, 13))
    ] == [
        False,
        False,
        True,
        True,
        False,
    ]


def test_the_first_clipper_says_it_once(monkeypatch, caplog):
    monkeypatch.setattr(torch, "__version__", "9.9.0")
    versions.log_untested_release.cache_clear()
    p = nn.Parameter(torch.ones(2))
    try:
        with caplog.at_level(logging.INFO, "distclip"):
            for _ in range(2):
                distclip.GradClipper([("p", p)], 1.0).rebuild()
    finally:
        versions.log_untested_release.cache_clear()
    assert [(r.name, r.levelname, r.message) for r in caplog.records] == [
        ("distclip", "WARNING", versions.untested_release_note("9.9.0"))
    ]


def test_it_ends_no_program_that_turns_warnings_into_errors_and_is_seen_without_a_set_up_of_logging():
    script = (
        "import torch, distclip; torch.__version__ = '9.9.0'; p = "
        "torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)\n"
        "print(distclip.GradClipper([('p', p)], 1.0).clip_().total_norm.item())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.startswith("1.414"), done.stderr
    assert done.stderr.count("and not with 9.9.0") == 1


@pytest.mark.skipif(
    versions.untested_release_note(torch.__version__) != "",
    reason="a series that launch/matrix.sh tries for the first time",
)
def test_nothing_is_said_of_a_torch_that_was_run(caplog):
    versions.log_untested_release.cache_clear()
    with caplog.at_level(logging.DEBUG, "distclip"):
        distclip.GradClipper([("p", nn.Parameter(torch.ones(2)))], 1.0)
    assert caplog.records == []
