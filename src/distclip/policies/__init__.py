"""One clipping rule per file, named as users search for it."""

from distclip.policies.adagc import AdaGC
from distclip.policies.agc import AGC
from distclip.policies.autoclip import AutoClip
from distclip.policies.escalate import Escalate
from distclip.policies.fixed import FixedNorm
from distclip.policies.normalize import Normalize
from distclip.policies.policy import LocalGrads, LocalStats, Policy, describe
from distclip.policies.schedule import Scheduled
from distclip.policies.spikes import SkipSpikes
from distclip.policies.value import FixedValue
from distclip.policies.warmup import Warmup
from distclip.policies.zclip import ZClip

__all__ = [
    "AGC",
    "AdaGC",
    "AutoClip",
    "Escalate",
    "FixedNorm",
    "FixedValue",
    "LocalGrads",
    "LocalStats",
    "Normalize",
    "Policy",
    "Scheduled",
    "SkipSpikes",
    "Warmup",
    "ZClip",
    "describe",
]
