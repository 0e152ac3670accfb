"""What `report.action` asks for: a lower learning rate for a while, or an earlier checkpoint without
the data that led away from it."""

from __future__ import annotations

import json
from pathlib import Path

import distclip
from config import Config
from jobs.job import Job
from refusal import Refused


class Ladder:
    """Acts on the reports of one run, alike on all ranks.

    Args:
        speaks: this rank says what is done, and writes what is left out.
    """

    def __init__(self, config: Config, job: Job, speaks: bool) -> None:
        self.rungs, self.job, self.speaks = config.clip.escalate, job, speaks
        self.checkpoint = config.output.checkpoint
        self.factor, self.lowered_until = 1.0, 0
        self.num_rolled_back = 0
        self.doubtful: dict[int, int] = {}  # batch → the step that it went wrong at
        self.left_out: list[int] = []  # batches
        # beside the checkpoints: a resumed run must read the same batches
        self.file = Path(self.checkpoint) / "left_out.json" if self.checkpoint else None
        if self.file is not None and self.file.exists():
            self.left_out = json.loads(self.file.read_text())

    def lr_factor(self, step: int) -> float:
        return self.factor if step < self.lowered_until else 1.0

    def batch_of(self, step: int) -> int:
        """The batch that a step reads: those that are left out are passed over."""
        batch = step
        for other in self.left_out:
            batch += other <= batch
        return batch

    def heed(self, step: int, report: distclip.ClipReport) -> int:
        """The step to go on with, after this one was taken or skipped."""
        if not (self.rungs.skip or self.rungs.lower_lr or self.rungs.roll_back):
            return step + 1  # on CUDA the report would be waited for
        action, batch = report.action, self.batch_of(step)
        if action != "none" or report.skipped:
            self.doubtful[batch] = step
        if action == "lower_lr":
            self._lower(step)
        elif action == "roll_back":
            return self._roll_back(step)
        return step + 1

    def _lower(self, step: int) -> None:
        self.factor = self.lr_factor(step + 1) * self.rungs.lower_by
        self.lowered_until = step + 1 + self.rungs.lower_for
        self._say(
            f"step {step}: the learning rate is multiplied by {self.factor:g} until step "
            f"{self.lowered_until}"
        )

    def _roll_back(self, step: int) -> int:
        self.num_rolled_back += 1
        if self.num_rolled_back > self.rungs.roll_backs:
            raise Refused(
                f"step {step}: the run was rolled back {self.rungs.roll_backs} times "
                f"(clip.escalate.roll_backs) and goes wrong again; look at its log, distclip "
                f"report"
            )
        # what the clipper has counted is not undone: else the same would be counted again
        known = self.job.clipper.state_dict()
        start = self.job.resume(self.checkpoint)
        if not start:
            self._say(f"step {step}: there is no checkpoint yet to roll back to")
            return step + 1
        self.job.clipper.load_state_dict(known)
        since = [batch for batch, at in self.doubtful.items() if at >= start]
        self.left_out = sorted({*self.left_out, *since})
        self.doubtful = {}
        if self.speaks and self.file is not None:
            self.file.write_text(json.dumps(self.left_out))
        self._say(
            f"step {step}: back to the checkpoint of step {start}, without the batches "
            f"{', '.join(map(str, since))}"
        )
        return start

    def _say(self, text: str) -> None:
        if self.speaks:
            print(text)
