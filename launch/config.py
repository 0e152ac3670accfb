"""What a training run can be told, in YAML and on the command line. An unknown key is an error that names the nearest known one."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import pairwise
from typing import Any, Literal, get_type_hints

import yaml
from jsonargparse import ArgumentParser


@dataclass
class Data:
    name: Literal["temporal_order", "images", "text"] = "temporal_order"
    folder: str = ""  # of Fashion-MNIST's idx files; empty: images made on the spot
    seed: int = 0


@dataclass
class Training:
    steps: int = 200  # optimizer steps
    batch: int = 64  # sequences per step, over all ranks and micro-steps
    accumulate: int = 1  # micro-steps per step
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.03
    warmup: int = 0  # steps of linear learning-rate warm-up; cosine decay to 0 after it
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # fp16 with a GradScaler
    seed: int = 0


@dataclass
class Clip:
    mode: Literal["none", "norm", "value", "normalize", "scheduled", "autoclip", "zclip", "adagc"] = "norm"  # none still measures
    threshold: float | None = None  # of the norm, of each element (value), or of the norm during warmup; 1.0 where none is given
    options: dict[str, Any] = field(default_factory=dict)  # of scheduled, autoclip, zclip and adagc, by the policy's own names
    warmup: int = 0  # steps at a fixed threshold before an adaptive mode decides
    skip_spikes: bool = False  # leave out steps whose norm is far above the latest ones
    groups: Literal["none", "per_layer", "per_parameter"] = "none"  # what has a norm and a threshold of its own
    on_nonfinite: Literal["skip", "raise", "propagate"] = "skip"


@dataclass
class Inject:
    """A gradient element that goes wrong on one rank, to see that no rank steps, or what a finite spike does to the norm.

    One replica under DDP that has a spike of its own has drifted: that is an error. A spike belongs into a shard.
    """

    kind: Literal["none", "overflow", "nan", "spike"] = "none"
    step: int = 10  # from 0
    rank: int = 0


@dataclass
class Output:
    log: str = ""  # JSONL file, one line a step
    checkpoint: str = ""  # folder; resumed from if it holds a checkpoint
    every: int = 100  # steps between checkpoints


@dataclass
class Config:
    model: Literal["recurrent", "lstm", "gpt"] = "recurrent"
    strategy: str = "ddp"  # see strategies/
    deepspeed: str = ""  # DeepSpeed's own JSON, for strategy: deepspeed
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    clip: Clip = field(default_factory=Clip)
    inject: Inject = field(default_factory=Inject)
    output: Output = field(default_factory=Output)


def read(arguments: Sequence[str]) -> Config:
    """`--config FILE --training.lr 0.1 …` → Config. SystemExit, with the nearest known key, for an unknown one."""
    known = [*_keys(Config), "config", "help"]
    for key, where in _given(arguments):
        if key not in known and not key.startswith("clip.options."):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            sys.exit(f"{where}: unknown key {key!r}{hint} The keys are: {', '.join(sorted(known[:-2]))}")
    parser = ArgumentParser(prog="train.py", description="One training program for all launchers")
    parser.add_argument("--config", action="config", help="a YAML file; see configs/")
    parser.add_class_arguments(Config)
    values = parser.parse_args(_files_first(arguments))
    values.pop("config", None)
    config = _build(Config, values.as_dict())
    if config.deepspeed and config.strategy != "deepspeed":
        sys.exit(f"deepspeed={config.deepspeed!r} has no part in strategy={config.strategy!r}; leave it out, or use strategy: deepspeed")
    return config


def _files_first(arguments: Sequence[str]) -> list[str]:
    """The parser lets the later win; what is given on the command line goes over every file, wherever it stands."""
    files = [i for i, a in enumerate(arguments) if a == "--config" or (i and arguments[i - 1] == "--config") or a.startswith("--config=")]
    return [arguments[i] for i in files] + [a for i, a in enumerate(arguments) if i not in files]


def _build(kind: Any, values: dict[str, Any]) -> Any:
    hints = get_type_hints(kind)
    return kind(**{k: _build(hints[k], dict(v)) if is_dataclass(hints[k]) else v for k, v in values.items()})


def _keys(kind: Any, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(kind)
    for f in fields(kind):
        if is_dataclass(hints[f.name]):
            yield from _keys(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}"


def _given(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    files = [b for a, b in pairwise(arguments) if a == "--config"] + [a[9:] for a in arguments if a.startswith("--config=")]
    for file in files:
        try:
            with open(file, encoding="utf-8") as stream:
                table = yaml.safe_load(stream) or {}
        except FileNotFoundError:
            sys.exit(f"--config {file}: there is no such file; configs/ holds some")
        yield from ((key, file) for key in _flat(table))
    for argument in arguments:
        if argument.startswith("--"):
            yield argument[2:].split("=")[0], "command line"


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
