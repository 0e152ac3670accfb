"""The public names: what `import distclip` offers."""

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
from distclip.exchange.channel import LOCAL
from distclip.functional import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from distclip.groups import (
    Exempt,
    Watch,
    by_name,
    by_optimizer,
    per_expert,
    per_layer,
    per_param_group,
    per_parameter,
)
from distclip.measure.rank_norms import RankNorms
from distclip.policies import (
    AGC,
    AdaGC,
    AutoClip,
    Escalate,
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
from distclip.records import Clamp, ClipReport, Culprit, Norms, Note, Scale, UnitScale
from distclip.report.sinks import JSONLSink, LoggingSink
from distclip.report.trackers import TensorBoardSink, WandbSink
from distclip.report.writer import Sink
from distclip.setup.placement import PRIVATE

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
    "Escalate",
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
    "Note",
    "PlacementError",
    "Policy",
    "RankNorms",
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
    "by_optimizer",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "per_expert",
    "per_layer",
    "per_param_group",
    "per_parameter",
]
