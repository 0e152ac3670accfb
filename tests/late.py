"""The CPU stands in for a device whose numbers the host reads late: the same code, told so."""

from unittest.mock import patch

from distclip import stages


def judged_late(clipper, late=True):
    """A clipper, before its first step, whose steps are judged one call later where they may be.
    With "device" all its steps are decided there, also those that the host must know at once."""
    if late:
        with patch.object(stages, "ASYNC_DEVICES", frozenset({"cpu", "cuda"})):
            clipper._adopt(clipper._stages.inputs)
    if late == "device" and clipper._state.on_host:
        clipper._state.move_to_device()
    return clipper
