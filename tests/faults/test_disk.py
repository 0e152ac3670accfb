"""A full disk under a sink, and checkpoints that are cut short or belong to something else."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import distclip


def clipper_of(*sinks, **options):
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    return distclip.GradClipper([("w", p)], **{"max_norm": 1.0} | options, sinks=sinks)


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_once_and_training_goes_on(tmp_path):
    clipper = clipper_of(distclip.JSONLSink("/dev/full"), distclip.JSONLSink(tmp_path / "log"))
    with pytest.warns(RuntimeWarning) as warned:
        clipper.clip_()
    assert str(warned[0].message) == (
        "JSONLSink failed at step 1 and is off from now on, training goes on: OSError: [Errno 28] "
        "No space left on device"
    )
    clipper.clip_()
    _, *steps = map(json.loads, (tmp_path / "log").read_text().splitlines())  # after its header
    assert [line["step"] for line in steps] == [1, 2]


def test_the_state_goes_through_a_file_with_weights_only(tmp_path):
    first, second = clipper_of(), clipper_of()
    first.clip_()
    torch.save(first.state_dict(), tmp_path / "clip.pt")
    second.load_state_dict(torch.load(tmp_path / "clip.pt", weights_only=True))
    assert equal(second.state_dict(), first.state_dict()) and second.clip_().step == 2


WRONG = {
    "cut short": (
        lambda s: {"step": s["step"]},
        "the checkpoint of the clipper lacks bad_in_a_row, groups, history.calls, history.clipped, "
        "history.skips, norm_type, policy, "
        "rules; it was cut short, or saved by something else",
    ),
    "another policy": (
        lambda s: s | {"policy": "Normalize(norm=1.0)"},
        "the checkpoint's policy is 'Normalize(norm=1.0)', this clipper's "
        "'FixedNorm(max_norm=1.0)'; build it as the saved one was",
    ),
    "other groups": (
        lambda s: s | {"groups": "a\nb"},
        "the checkpoint's groups is 'a\\nb', this clipper's 'all'; build it as the saved one was",
    ),
    "another norm": (
        lambda s: s | {"norm_type": "1.0"},
        "the checkpoint's norm_type is '1.0', this clipper's '2.0'; build it as the saved one was",
    ),
    "no norm": (
        lambda s: {name: value for name, value in s.items() if name != "norm_type"},
        "the checkpoint of the clipper lacks norm_type; it was cut short, or saved by something "
        "else",
    ),
    "other rules": (
        lambda s: s | {"rules": "ZClip: all"},
        "the checkpoint's rules is 'ZClip: all', this clipper's 'FixedNorm(max_norm=1.0): all'; "
        "build it as the saved one was",
    ),
    "more than this has": (
        lambda s: s | {"0.1": torch.zeros(1), "0.0": torch.zeros(1)},
        "the checkpoint of the clipper has 0.0, 0.1, this clipper has not; build it as the saved "
        "one was",
    ),
    "a text that is none": (
        lambda s: s | {"norm_type": torch.tensor(2.0)},
        "the checkpoint's norm_type is tensor(2.), this clipper's '2.0'; build it as the saved one "
        "was",
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


def of_two(rules, **options):
    params = [(name, nn.Parameter(torch.zeros(2))) for name in ("p0", "p1")]
    for _, p in params:
        p.grad = torch.tensor([3.0, 4.0])
    clipper = distclip.GradClipper(
        params, **{"max_norm": 1.0, "groups": distclip.by_name(rules)} | options
    )
    clipper.clip_()
    return clipper


NORM = "FixedNorm(max_norm={})".format
OTHERS = {  # what is saved, into what it is loaded, and both as the text shows them
    "another policy": (
        lambda: of_two({"p0": distclip.ZClip()}),
        lambda: of_two({"p0": distclip.AdaGC()}),
        f"rules is 'ZClip(z_threshold=2.5, alpha=0.97, warmup=25, max_norm=inf): p0\\n{NORM(1.0)}: "
        f"rest'",
        f"'AdaGC(lambda_rel=1.04, lambda_abs=1.0, beta=0.99, warmup=100): p0\\n{NORM(1.0)}: rest'",
    ),
    "one policy for both": (
        lambda: of_two({"p0": 2.0, "p1": 2.0}),
        lambda: of_two(dict.fromkeys(("p0", "p1"), distclip.FixedNorm(2.0))),
        f"rules is '{NORM(2.0)}: p0\\n{NORM(2.0)}: p1'",
        f"'{NORM(2.0)}: p0, p1'",
    ),
    "exchanged": (
        lambda: of_two({"p0": distclip.Normalize(1.0), "p1": 2.0}),
        lambda: of_two({"p0": 2.0, "p1": distclip.Normalize(1.0)}),
        f"rules is 'Normalize(norm=1.0): p0\\n{NORM(2.0)}: p1'",
        f"'{NORM(2.0)}: p0\\nNormalize(norm=1.0): p1'",
    ),
    "norms of another p": (
        lambda: of_two({"p0": distclip.ZClip()}, norm_type=2),
        lambda: of_two({"p0": distclip.ZClip()}, norm_type=1),
        "norm_type is '2.0'",
        "'1.0'",
    ),
}


@pytest.mark.parametrize("through", ["memory", "a file", "torch.distributed.checkpoint"])
@pytest.mark.parametrize("one, other, there, here", OTHERS.values(), ids=OTHERS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_state_of_other_rules_is_refused_and_one_of_these_is_not(
    one, other, there, here, through, tmp_path
):
    def load(clipper):
        if through == "memory":
            clipper.load_state_dict(first.state_dict())
        elif through == "a file":
            clipper.load_state_dict(torch.load(tmp_path / "clip.pt", weights_only=True))
        else:
            dcp.load({"clipper": clipper}, checkpoint_id=tmp_path / "dcp")

    first, second, same = one(), other(), one()
    first.clip_()
    torch.save(first.state_dict(), tmp_path / "clip.pt")
    if through == "torch.distributed.checkpoint":
        dcp.save({"clipper": first}, checkpoint_id=tmp_path / "dcp")
    assert all(isinstance(value, (torch.Tensor, str)) for value in first.state_dict().values())
    before = second.state_dict()
    with pytest.raises(distclip.ConfigError) as error:
        load(second)
    assert str(error.value) == (
        f"the checkpoint's {there}, this clipper's {here}; build it as the saved one was"
    )
    assert equal(second.state_dict(), before)
    load(same)
    assert equal(same.state_dict(), first.state_dict()) and same.clip_().step == 3
