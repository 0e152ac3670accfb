"""One clipping rule per file, named as users search for it."""

from distclip.policies.fixed import FixedNorm
from distclip.policies.normalize import Normalize
from distclip.policies.policy import LocalStats, Policy
from distclip.policies.value import FixedValue

__all__ = ["FixedNorm", "FixedValue", "LocalStats", "Normalize", "Policy"]
