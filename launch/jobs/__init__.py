"""Who runs a step: torch's own parts, or a framework that owns some of it."""

from __future__ import annotations

from config import Config
from jobs.job import Job


def make_job(config: Config, device: str) -> Job:
    if config.strategy == "accelerate":  # imported only where asked for: both bring much with them
        from jobs.accelerated import Accelerated

        return Accelerated(config, device)
    if config.strategy == "deepspeed":
        from jobs.engine import Engine

        return Engine(config, device)
    return Job(config, device)
