"""`clip` of the training program's configuration: names to policies, and what is refused."""

import pytest

from launch.test_data import programs  # noqa: F401 - a fixture: the programs' modules are found

CHOICES = {
    "norm": ({}, "FixedNorm(max_norm=1.0)"),
    "norm at 2": ({"mode": "norm", "threshold": 2.0}, "FixedNorm(max_norm=2.0)"),
    "none": ({"mode": "none"}, "FixedNorm(max_norm=inf)"),
    "value": ({"mode": "value", "threshold": 0.01}, "FixedValue(clip_value=0.01)"),
    "normalize": ({"mode": "normalize"}, "Normalize(norm=1.0)"),
    "scheduled": (
        {"mode": "scheduled", "options": {"schedule": [[0, 2], [9, 1]]}},
        "Scheduled(((0.0, 2.0), (9.0, 1.0)))",
    ),
    "autoclip": (
        {"mode": "autoclip", "options": {"percentile": 20.0}, "warmup": 5, "threshold": 3.0},
        "Warmup(AutoClip(percentile=20.0, window=1000), steps=5, max_norm=3.0)",
    ),
    "zclip": (
        {"mode": "zclip", "options": {"alpha": 0.9}},
        "ZClip(z_threshold=2.5, alpha=0.9, warmup=25, max_norm=inf)",
    ),
    "adagc": ({"mode": "adagc"}, "AdaGC(lambda_rel=1.04, lambda_abs=1.0, beta=0.99, warmup=100)"),
    "spikes": (
        {"mode": "norm", "skip_spikes": True},
        "SkipSpikes(FixedNorm(max_norm=1.0), sigma=6.0, window=128, warmup=64, factor=2.0)",
    ),
}


@pytest.mark.parametrize("choice, policy", CHOICES.values(), ids=CHOICES)
def test_names_lead_to_policies(choice, policy):
    from clipping import rule
    from config import Clip

    assert repr(rule(Clip(**choice))) == policy


REFUSED = {
    "threshold": (
        {"mode": "zclip", "threshold": 1.0},
        "clip.threshold=1 has no part in clip.mode='zclip'; leave it out (over a file: "
        "--clip.threshold null), or set clip.warmup",
    ),
    "options": (
        {"options": {"alpha": 1}},
        "clip.options={'alpha': 1} has no part in clip.mode='norm'; it is for scheduled, autoclip, "
        "zclip",
    ),
    "warmup": (
        {"mode": "value", "warmup": 3},
        "clip.warmup=3 has no part in clip.mode='value'; it is for scheduled, autoclip",
    ),
    "name": (
        {"mode": "zclip", "options": {"beta": 1}},
        "clip.options: zclip has no 'beta'; it has z_threshold, alpha, warmup, max_norm",
    ),
    "schedule": (
        {"mode": "scheduled"},
        "clip.options: scheduled needs schedule: [[step, threshold], ...]",
    ),
    "number": (
        {"mode": "zclip", "options": {"alpha": 2.0}},
        "clip: ZClip: alpha=2.0 must be between 0 and 1; the paper takes 0.97",
    ),
}


@pytest.mark.parametrize("choice, words", REFUSED.values(), ids=REFUSED)
def test_what_has_no_effect_is_refused(choice, words):
    from clipping import rule
    from config import Clip

    with pytest.raises(SystemExit) as told:
        rule(Clip(**choice))
    assert words in str(told.value)


def test_options_of_a_policy_on_the_command_line(tmp_path):
    from clipping import options, rule
    from config import read

    (tmp_path / "a.yaml").write_text(
        "clip: {mode: adagc, options: {beta: 0.9, warmup: 4}, groups: per_parameter}\n"
    )
    config = read(["--config", str(tmp_path / "a.yaml"), "--clip.options.beta", "0.5"])
    assert repr(rule(config.clip)) == "AdaGC(lambda_rel=1.04, lambda_abs=1.0, beta=0.5, warmup=4)"
    assert repr(options(config)["groups"]) == "_PerParameter()"
