"""A GradScaler under a framework that updates it after each optimizer's step: Accelerate,
Fabric."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


def unscale_once(scaler: Any, optimizer: Any) -> None:
    """`scaler.unscale_(optimizer)`, unless it was called in this round already."""
    try:
        scaler.unscale_(optimizer)
    except RuntimeError as error:
        # torch's two errors: called twice, or after step(), which the clip itself refuses
        if "unscale_()" not in str(error):
            raise


class DeferredScalerUpdate:
    """Puts `scaler.update()` off until the next loss is scaled.

    With several optimizers, an update after each one's step resets the record of which others are
    unscaled already, so that they would be unscaled a second time, and it changes the scale that
    was used for their gradients. Here there is one update per round, as torch requires.
    """

    def __init__(self, scaler: Any) -> None:
        self._update, self._scale, self._get_scale, self._state_dict = (
            scaler.update,
            scaler.scale,
            scaler.get_scale,
            scaler.state_dict,
        )
        self._due = self._clipping = False
        scaler.update, scaler.scale, scaler.get_scale, scaler.state_dict = (
            self.update,
            self.scale,
            self.get_scale,
            self.state_dict,
        )

    @contextmanager
    def clipping(self) -> Generator[None]:
        """Within this context reading the scale does not begin a new round."""
        self._clipping = True
        try:
            yield
        finally:
            self._clipping = False

    def update(self, new_scale: Any = None) -> None:
        if new_scale is None:
            self._due = True
        else:
            self._due = False
            self._update(new_scale)

    def scale(self, outputs: Any) -> Any:
        if not self._clipping:
            self._run_due_update()
        return self._scale(outputs)

    def get_scale(self) -> float:
        self._run_due_update()
        return self._get_scale()

    def state_dict(self) -> dict[str, Any]:
        self._run_due_update()
        return self._state_dict()

    def _run_due_update(self) -> None:
        if self._due:
            self._due = False
            self._update()
