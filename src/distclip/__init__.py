"""distclip: every rank clips identically."""

from types import ModuleType as _Module

from distclip.clipper import GradClipper
from distclip.errors import (
    AgreementError,
    ConfigError,
    DistclipError,
    ExchangeError,
    GradientError,
    NonFiniteError,
    PlacementError,
)
from distclip.exchange import LOCAL
from distclip.functional import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from distclip.groups import Exempt, Watch, by_name, per_layer, per_param_group, per_parameter
from distclip.placement import PRIVATE
from distclip.policies import (
    AGC,
    AdaGC,
    AutoClip,
    FixedNorm,
    FixedValue,
    LocalGrads,
    LocalStats,
    Normalize,
    Policy,
    Scheduled,
    SkipSpikes,
    Warmup,
    ZClip,
)
from distclip.records import Clamp, ClipReport, Culprit, Norms, Scale, UnitScale
from distclip.report import Sink
from distclip.sinks import JSONLSink, LoggingSink
from distclip.trackers import TensorBoardSink, WandbSink

__version__ = "0.1.0"

__all__ = [
    "AGC",
    "LOCAL",
    "PRIVATE",
    "AdaGC",
    "AgreementError",
    "AutoClip",
    "Clamp",
    "ClipReport",
    "ConfigError",
    "Culprit",
    "DistclipError",
    "Exempt",
    "ExchangeError",
    "FixedNorm",
    "FixedValue",
    "GradClipper",
    "GradientError",
    "JSONLSink",
    "LocalGrads",
    "LocalStats",
    "LoggingSink",
    "NonFiniteError",
    "Normalize",
    "Norms",
    "PlacementError",
    "Policy",
    "Scale",
    "Scheduled",
    "Sink",
    "SkipSpikes",
    "TensorBoardSink",
    "UnitScale",
    "WandbSink",
    "Warmup",
    "Watch",
    "ZClip",
    "by_name",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "per_layer",
    "per_param_group",
    "per_parameter",
]


def __getattr__(name: str) -> _Module:
    """`distclip.integrations` is imported when it is named."""
    if name == "integrations":
        from importlib import import_module

        return import_module("distclip.integrations")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "integrations"})
