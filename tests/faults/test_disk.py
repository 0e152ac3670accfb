"""A full disk under a sink, and checkpoints that are cut short or belong to something else."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import distclip


def clipper_of(*sinks, **options):
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    return distclip.GradClipper([("w", p)], **{"max_norm": 1.0} | options, sinks=sinks)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_once_and_training_goes_on(tmp_path):
    clipper = clipper_of(distclip.JSONLSink("/dev/full"), distclip.JSONLSink(tmp_path / "log"))
    with pytest.warns(RuntimeWarning) as warned:
        clipper.clip_()
    assert str(warned[0].message) == (
        "JSONLSink failed at step 1 and is off from now on, training goes on: OSError: [Errno 28] No space left on device"
    )
    clipper.clip_()
    assert [json.loads(line)["step"] for line in (tmp_path / "log").read_text().splitlines()] == [1, 2]


def test_the_state_goes_through_a_file_with_weights_only(tmp_path):
    first, second = clipper_of(), clipper_of()
    first.clip_()
    torch.save(first.state_dict(), tmp_path / "clip.pt")
    second.load_state_dict(torch.load(tmp_path / "clip.pt", weights_only=True))
    assert equal(second.state_dict(), first.state_dict()) and second.clip_().step == 2


WRONG = {
    "cut short": (
        lambda s: {"step": s["step"]},
        "the checkpoint of the clipper lacks bad_in_a_row, groups, history.calls, history.clipped, history.skips, policy; it was cut "
        "short, or saved by something else",
    ),
    "another policy": (
        lambda s: s | {"policy": "FixedNorm(max_norm=2.0)"},
        "the checkpoint's policy is 'FixedNorm(max_norm=2.0)', this clipper's 'FixedNorm(max_norm=1.0)'; build it as the saved one was",
    ),
    "other groups": (
        lambda s: s | {"groups": "a\nb"},
        "the checkpoint's groups is 'a\\nb', this clipper's 'all'; build it as the saved one was",
    ),
    "spoilt": (
        lambda s: s | {"step": torch.zeros(3)},
        "the checkpoint's step is (3,), not a tensor of shape (); was it cut short?",
    ),
}


@pytest.mark.parametrize("spoil, text", WRONG.values(), ids=WRONG)
def test_a_wrong_checkpoint_is_refused_and_nothing_taken_over(spoil, text):
    clipper = clipper_of()
    clipper.clip_()
    before = clipper.state_dict()
    with pytest.raises(distclip.ConfigError) as error:
        clipper.load_state_dict(spoil(before | {"step": torch.tensor(7)}))
    assert str(error.value) == text
    assert equal(clipper.state_dict(), before)
