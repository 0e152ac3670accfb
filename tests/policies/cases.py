"""Every policy beside its reference, with the papers' numbers and with others."""

import math

import numpy as np
import torch

import distclip
from policies import reference
from policies.trace import GROUPS

INF = math.inf
POINTS = [(0, 2.0), (100, 0.5), (101, 3.0), (300, 1.0)]


def autoclip(percentile=10, window=1000):
    return reference.AutoClip(GROUPS, percentile=percentile, window=window)


def zclip(z_threshold=2.5, alpha=0.97, warmup=25, max_norm=INF):
    return reference.ZClip(
        GROUPS, z_threshold=z_threshold, alpha=alpha, warmup=warmup, max_norm=max_norm
    )


def adagc(lambda_rel=1.04, lambda_abs=1.0, beta=0.99, warmup=100):
    return reference.AdaGC(
        GROUPS, lambda_rel=lambda_rel, lambda_abs=lambda_abs, beta=beta, warmup=warmup
    )


def scheduled(at):
    return reference.Scheduled(GROUPS, at)


def skipping(inner, sigma=6, window=128, warmup=64, factor=2):
    return reference.SkipSpikes(inner, sigma, window, warmup, factor)


def escalating(inner, rungs=(1, 3, 6), window=100, sigma=6, factor=2, history=128, warmup=32):
    named = dict(zip(("skip", "lower_lr", "roll_back"), rungs, strict=True))
    rungs = {name: number for name, number in named.items() if number}
    return reference.Escalate(inner, rungs, window, sigma, factor, history, warmup)


def decaying(step):
    return 0.5 + 1.5 * torch.exp(-step / 100)


CASES = {
    "scheduled": (
        distclip.Scheduled(POINTS),
        lambda: scheduled(lambda t: np.interp(t, *zip(*POINTS, strict=True))),
    ),
    "scheduled by a function": (
        distclip.Scheduled(decaying),
        lambda: scheduled(lambda t: 0.5 + 1.5 * np.exp(-t / 100)),
    ),
    "autoclip": (distclip.AutoClip(), autoclip),
    "autoclip, small window": (distclip.AutoClip(37.5, window=16), lambda: autoclip(37.5, 16)),
    "autoclip, minimum": (distclip.AutoClip(0, window=50), lambda: autoclip(0, 50)),
    "autoclip, maximum": (distclip.AutoClip(100, window=50), lambda: autoclip(100, 50)),
    "zclip": (distclip.ZClip(), zclip),
    "zclip, bounded": (distclip.ZClip(2.0, 0.9, 10, 1.0), lambda: zclip(2.0, 0.9, 10, 1.0)),
    "adagc": (distclip.AdaGC(), adagc),
    "adagc, other numbers": (distclip.AdaGC(1.2, 60.0, 0.9, 20), lambda: adagc(1.2, 60.0, 0.9, 20)),
    "warmup": (
        distclip.Warmup(distclip.AutoClip(), 30, 1.5),
        lambda: reference.Warmup(autoclip(), 30, 1.5),
    ),
    "warmup of skipping": (
        distclip.Warmup(distclip.SkipSpikes(distclip.AdaGC(), warmup=16), 200, 1.0),
        lambda: reference.Warmup(skipping(adagc(), warmup=16), 200, 1.0),
    ),
    "skip spikes": (distclip.SkipSpikes(distclip.ZClip()), lambda: skipping(zclip())),
    "skip spikes, other numbers": (
        distclip.SkipSpikes(distclip.AutoClip(50), 3, 20, 10, 1),
        lambda: skipping(autoclip(50), 3, 20, 10, 1),
    ),
    "escalate, skip": (distclip.Escalate(distclip.ZClip()), lambda: escalating(zclip())),
    "escalate, skip spikes": (
        distclip.Escalate(distclip.SkipSpikes(distclip.AdaGC(), warmup=16), None, 2, 4, 60),
        lambda: escalating(skipping(adagc(), warmup=16), (None, 2, 4), 60),
    ),
    "escalate, skip late": (
        distclip.Escalate(
            distclip.AutoClip(50),
            2,
            None,
            5,
            window=150,
            sigma=3.0,
            factor=1.2,
            history=20,
            warmup=5,
        ),
        lambda: escalating(autoclip(50), (2, None, 5), 150, 3, 1.2, 20, 5),
    ),
}
