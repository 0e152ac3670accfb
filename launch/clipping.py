"""`clip` of the configuration → what GradClipper is told."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import distclip
from config import Clip, Config
from refusal import Refused

FIXED = {"norm": distclip.FixedNorm, "value": distclip.FixedValue, "normalize": distclip.Normalize}
ADAPTIVE = {
    "scheduled": distclip.Scheduled,
    "autoclip": distclip.AutoClip,
    "zclip": distclip.ZClip,
    "adagc": distclip.AdaGC,
}
GROUPS = {
    "none": lambda: None,
    "per_layer": lambda: distclip.per_layer(2),  # of two components: blocks.0 and blocks.1 apart
    "per_parameter": distclip.per_parameter,
}


def rule(clip: Clip) -> distclip.Policy:
    """The policy. Refused where `clip` says what its mode cannot honour, or what the policy
    refuses."""
    uses_threshold = clip.mode in FIXED or clip.warmup > 0
    if clip.threshold is not None and not uses_threshold:
        raise Refused(
            f"clip.threshold={clip.threshold:g} has no part in clip.mode={clip.mode!r}; leave it "
            f"out (over a file: "
            "--clip.threshold null), or set clip.warmup too"
        )
    if clip.options and clip.mode not in ADAPTIVE:
        raise Refused(
            f"clip.options={clip.options} has no part in clip.mode={clip.mode!r}; it is for "
            f"{', '.join(ADAPTIVE)} "
            "(over a file: --clip.options {})"
        )
    if clip.warmup and clip.mode not in ADAPTIVE:
        raise Refused(
            f"clip.warmup={clip.warmup} has no part in clip.mode={clip.mode!r}; it is for "
            f"{', '.join(ADAPTIVE)} "
            "(over a file: --clip.warmup 0)"
        )
    threshold = 1.0 if clip.threshold is None else clip.threshold
    try:
        if clip.mode == "none":
            policy: distclip.Policy = distclip.FixedNorm(math.inf)
        elif clip.mode in FIXED:
            policy = FIXED[clip.mode](threshold)
        else:
            policy = ADAPTIVE[clip.mode](**known_options(clip))
        if clip.warmup:
            policy = distclip.Warmup(policy, clip.warmup, threshold)
        if clip.skip_spikes:
            policy = distclip.SkipSpikes(policy)
        ladder = clip.escalate
        rungs = [number or None for number in (ladder.skip, ladder.lower_lr, ladder.roll_back)]
        return distclip.Escalate(policy, *rungs, ladder.window) if any(rungs) else policy
    except distclip.ConfigError as error:
        raise Refused(f"clip: {error}") from None
    except (TypeError, ValueError) as error:
        raise Refused(
            f"clip.options={clip.options} are not what {clip.mode} takes: {error}"
        ) from None


def known_options(clip: Clip) -> dict[str, Any]:
    """Those of the policy, by its own names."""
    names = [f.name for f in fields(ADAPTIVE[clip.mode])]
    for name in clip.options:
        if name not in names:
            raise Refused(f"clip.options: {clip.mode} has no {name!r}; it has {', '.join(names)}")
    if clip.mode == "scheduled" and "schedule" not in clip.options:
        raise Refused("clip.options: scheduled needs schedule: [[step, threshold], ...]")
    return clip.options


def options(config: Config) -> dict[str, Any]:
    """GradClipper's other options; reports of rank 0 go to output.log, and what is skipped to the
    console."""
    clip, sinks = config.clip, [distclip.LoggingSink()]
    if config.output.log:
        sinks.append(distclip.JSONLSink(config.output.log))
    on_nonfinite = clip.on_nonfinite
    # a scaler must skip what overflows
    ladder = clip.escalate
    leaves_out = clip.skip_spikes or ladder.skip or ladder.lower_lr or ladder.roll_back
    if clip.mode == "none" and not leaves_out and config.training.precision != "fp16":
        on_nonfinite = "propagate"
    # DeepSpeed's engines take no such option
    watch = {"watch": distclip.Watch(distclip.per_layer(2))} if clip.watch else {}
    return {
        "groups": GROUPS[clip.groups](),
        "on_nonfinite": on_nonfinite,
        "sinks": sinks,
        **watch,
    }
