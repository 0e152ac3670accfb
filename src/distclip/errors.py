"""Every refusal. A message says who, what was seen, and what to do."""

from __future__ import annotations


class DistclipError(Exception):
    """Base of all errors that distclip raises by itself."""


class ConfigError(DistclipError, ValueError):
    """An argument that cannot be honoured."""


class PlacementError(DistclipError, ValueError):
    """A parameter of which distclip cannot tell what part this rank holds."""


class GradientError(DistclipError, RuntimeError):
    """A gradient that does not fit the plan: unreduced, unsharded, missing everywhere, or of a
    replaced parameter."""


class AgreementError(DistclipError, RuntimeError):
    """Ranks that should hold, run or decide the same do not."""


class NonFiniteError(DistclipError, RuntimeError):
    """Gradients hold inf or NaN, and the caller asked for an error."""


class ExchangeError(DistclipError, RuntimeError):
    """A collective failed or timed out: a rank was lost, is stuck, or never called."""
