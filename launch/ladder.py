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
        speaks: this rank says what is done, and writes what is left out and how rates are lowered.
        start: the step to begin with; rates that were lowered before it are lowered again.
    """

    def __init__(self, config: Config, job: Job, speaks: bool, start: int) -> None:
        self.rungs, self.job, self.speaks = config.clip.escalate, job, speaks
        self.checkpoint = config.output.checkpoint
        # from one step until another, and the factor: each holds until the next one's begin
        self.lowered: list[tuple[int, int, float]] = []
        self.num_rolled_back = 0
        self.doubtful: dict[int, int] = {}  # batch → the step that it went wrong at
        self.left_out: list[int] = []  # batches
        # beside the checkpoints: a resumed run must read the same batches, at the same rates
        folder = Path(self.checkpoint) if self.checkpoint else None
        self.file = folder / "left_out.json" if folder else None
        self.rates_file = folder / "lowered.json" if folder else None
        if self.file is not None and self.file.exists():
            self.left_out = json.loads(self.file.read_text())
        if self.rates_file is not None and self.rates_file.exists():
            lowered = [tuple(each) for each in json.loads(self.rates_file.read_text())]
            self.lowered = [each for each in lowered if each[0] <= start]

    def lr_factor(self, step: int) -> float:
        begun = [each for each in self.lowered if each[0] <= step]
        return begun[-1][2] if begun and step < begun[-1][1] else 1.0

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
        factor = self.lr_factor(step + 1) * self.rungs.lower_by
        until = step + 1 + self.rungs.lower_for
        self._remember_rates([*self.lowered, (step + 1, until, factor)])
        self._say(f"step {step}: the learning rate is multiplied by {factor:g} until step {until}")

    def _remember_rates(self, lowered: list[tuple[int, int, float]]) -> None:
        self.lowered = lowered
        if self.speaks and self.rates_file is not None:
            self.rates_file.parent.mkdir(parents=True, exist_ok=True)
            self.rates_file.write_text(json.dumps(lowered))

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
        # what is lowered now is so from there on
        self._remember_rates([(min(a, start), b, factor) for a, b, factor in self.lowered])
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
