"""What a training run can be told, in YAML and on the command line. An unknown key is an error that
names the nearest known one."""

from __future__ import annotations

import difflib
import math
import re
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from refusal import Refused


def option(default: Any, text: str, *, least: int | None = None, above: float | None = None) -> Any:
    """A field that --help explains; a number may have a least value, or one that it must be
    above."""
    return field(default=default, metadata={"help": text, "least": least, "above": above})


@dataclass
class Data:
    name: Literal["temporal_order", "images", "text"] = option(
        "temporal_order", "what is learned: recurrent reads temporal_order, lstm images, gpt text"
    )
    folder: str = option("", "of Fashion-MNIST's idx files; empty: images made on the spot")
    seed: int = option(0, "of the data")


@dataclass
class Training:
    steps: int = option(200, "optimizer steps, those of a resumed run included", least=1)
    batch: int = option(64, "sequences a step, over all ranks and micro-steps", least=1)
    accumulate: int = option(1, "micro-steps a step", least=1)
    optimizer: Literal["sgd", "adamw"] = option("sgd", "torch's")
    lr: float = option(0.03, "learning rate after warm-up", above=0)
    warmup: int = option(
        0, "steps of linear learning-rate warm-up; cosine decay to 0 after it", least=0
    )
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "fp16 comes with a GradScaler")
    seed: int = option(0, "of the weights")


@dataclass
class Escalate:
    """A ladder for spikes and bad steps that come again and again (distclip.Escalate)."""

    skip: int = option(
        0, "from so many in the window on spikes are left out; 0: no such rung", least=0
    )
    lower_lr: int = option(
        0, "so many lower the learning rate for a while; 0: no such rung", least=0
    )
    roll_back: int = option(
        0,
        "so many load the latest checkpoint and leave out the batches that went wrong since it; "
        "0: no such rung",
        least=0,
    )
    window: int = option(100, "steps over which they are counted", least=1)
    lower_by: float = option(0.5, "factor of the learning rate", above=0)
    lower_for: int = option(50, "steps that it stays lowered", least=1)
    roll_backs: int = option(3, "so often; the next one ends the run", least=0)


@dataclass
class Clip:
    mode: Literal[
        "none", "norm", "value", "normalize", "scheduled", "autoclip", "zclip", "adagc"
    ] = option("norm", "how gradients are clipped; none still measures")
    threshold: float | None = option(
        None,
        "of the norm, of each element (value), or of the norm during clip.warmup; 1 where "
        "none is given. null takes a file's away",
    )
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "of scheduled, autoclip, zclip and adagc, by the policy's own names: "
            "--clip.options.alpha 0.9. {} takes a file's away"
        },
    )
    warmup: int = option(0, "steps at a fixed threshold before an adaptive mode decides", least=0)
    skip_spikes: bool = option(False, "leave out steps whose norm is far above the latest ones")
    escalate: Escalate = field(default_factory=Escalate)
    watch: bool = option(
        False, "each layer's norm in the log, every 10 steps and at steps that matter"
    )
    rank_norms: bool = option(
        False, "each rank's own norm in the log (ddp, fsdp2, hsdp): which one lies off"
    )
    groups: Literal["none", "per_layer", "per_parameter"] = option(
        "none", "what has a norm and a threshold of its own"
    )
    on_nonfinite: Literal["skip", "raise", "propagate"] = option(
        "skip", "what becomes of a step whose norm is inf or NaN"
    )


@dataclass
class Inject:
    """A fault: a gradient element that goes wrong on one rank, to see that no rank steps, or what a
    finite spike does to the norm; data, a rank or a layer that go wrong, to find them in the log.

    One replica under DDP that has a spike of its own has drifted: that is an error. A spike belongs
    into a shard.
    """

    kind: Literal["none", "overflow", "nan", "spike", "rank", "batch", "layer"] = option(
        "none",
        "what one gradient element becomes, to see that no rank steps; rank: all gradients of a "
        "rank 100 times as large before they are reduced; batch: a rank reads zeros, as of an "
        "empty file; layer: a weight 128 times as large, on all ranks",
    )
    step: int = option(10, "at which step, from 0", least=0)
    batches: int = option(1, "in how many batches in a row, from that step's on", least=1)
    rank: int = option(0, "on which rank", least=0)
    weight: str = option("", "of kind layer: a parameter's name, such as blocks.1.out.weight")


@dataclass
class Output:
    log: str = option("", "JSONL file, one line a step; appended to")
    checkpoint: str = option("", "folder; the run goes on from the checkpoint that it holds")
    every: int = option(100, "steps between checkpoints", least=1)


@dataclass
class Config:
    model: Literal["recurrent", "lstm", "gpt"] = option(
        "recurrent", "a ReLU network, an LSTM, or a small GPT on bytes"
    )
    strategy: str = option(
        "ddp",
        "how the model is spread over ranks: single, ddp, fsdp1, fsdp2, hsdp, tp, tp_fsdp2, "
        "pp, accelerate, deepspeed",
    )
    deepspeed: str = option("", "DeepSpeed's own JSON, for strategy: deepspeed")
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    clip: Clip = field(default_factory=Clip)
    inject: Inject = field(default_factory=Inject)
    faults: list[Inject] = field(
        default_factory=list,
        metadata={
            "help": "more of them: a list, each with inject's keys; over a file's list, keys that "
            "are left out stay as they are at that place"
        },
    )
    output: Output = field(default_factory=Output)

    @property
    def injected(self) -> list[Inject]:
        """All faults."""
        return [fault for fault in (self.inject, *self.faults) if fault.kind != "none"]


def read(arguments: Sequence[str]) -> Config:
    """`--config FILE --training.lr 0.1 …` → Config.

    Raises:
        Refused: an unknown key, with the nearest known one; a file that is no configuration; a
            value that makes no sense.
        SystemExit: 0, after --help.
    """
    leaves = dict(_leaves(Config))
    known = [*leaves, "config", "help", "print_config"]
    for key, where in _given(arguments):
        if key not in known and not key.startswith("clip.options."):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise Refused(
                f"{where}: unknown key {key!r}{hint} The keys are: {', '.join(sorted(leaves))}"
            )
    try:
        values = _parser(leaves).parse_args(_files_first(arguments))
    except ArgumentError as error:
        raise Refused(_shortened(str(error))) from None
    values.pop("config", None)
    config = _build(Config, values.as_dict())
    _check(config, leaves)
    return config


def _parser(leaves: dict[str, tuple[Any, Any]]) -> ArgumentParser:
    parser = ArgumentParser(
        prog="train.py", exit_on_error=False, usage="train.py [--config FILE] [--KEY VALUE ...]",
        description="One training program for all launchers. Keys stand in YAML files as training: "
                    "{lr: 0.1}, and on the command line, "
        "which goes over the files, as --training.lr 0.1.",
        epilog="exit codes: 0 trained, 1 failed, 2 the configuration cannot be honoured, 130 ended "
               "by Ctrl-C",
    )  # fmt: skip
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="a YAML file; see configs/"
    )
    groups = {"": parser}
    for key, (hint, leaf) in leaves.items():
        part = key.rpartition(".")[0]
        if part not in groups:
            groups[part] = parser.add_argument_group(part)
        default = leaf.default if leaf.default_factory is MISSING else leaf.default_factory()
        groups[part].add_argument(
            f"--{key}", type=hint, default=default, help=leaf.metadata["help"]
        )
    return parser


def _check(config: Config, leaves: dict[str, tuple[Any, Any]]) -> None:
    for key, (_, leaf) in leaves.items():
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        least, above = leaf.metadata.get("least"), leaf.metadata.get("above")
        if least is not None and value < least:
            raise Refused(f"{key}={value} must be at least {least}: {leaf.metadata['help']}")
        if above is not None and not above < value < math.inf:
            raise Refused(
                f"{key}={value} must be finite and above {above}: {leaf.metadata['help']}"
            )
    if config.deepspeed and config.strategy != "deepspeed":
        raise Refused(
            f"deepspeed={config.deepspeed!r} has no part in strategy={config.strategy!r}; leave it "
            f'out (over a file: --deepspeed ""), or '
            "use strategy: deepspeed"
        )
    if config.clip.rank_norms and config.strategy not in ("ddp", "fsdp2", "hsdp"):
        raise Refused(
            f"clip.rank_norms: strategy={config.strategy!r} shows no rank's own gradients; it is "
            f"for ddp, fsdp2 and hsdp"
        )
    for fault in (config.inject, *config.faults):
        _check_fault(fault, config.strategy)
    if config.clip.escalate.roll_back and not config.output.checkpoint:
        raise Refused(
            f"clip.escalate.roll_back={config.clip.escalate.roll_back} loads a checkpoint; name "
            f"their folder, --output.checkpoint"
        )
    if config.output.log and Path(config.output.log).is_dir():
        raise Refused(f"output.log={config.output.log!r} is a folder; name a file in it")
    if (
        config.output.checkpoint
        and Path(config.output.checkpoint).exists()
        and not Path(config.output.checkpoint).is_dir()
    ):
        raise Refused(f"output.checkpoint={config.output.checkpoint!r} is a file; name a folder")


def _check_fault(fault: Inject, strategy: str) -> None:
    kinds = {"rank": ("single", "ddp", "fsdp1", "fsdp2", "hsdp"), "layer": ("single", "ddp")}
    if strategy not in kinds.get(fault.kind, (strategy,)):
        raise Refused(
            f"inject.kind={fault.kind!r} has no part in strategy={strategy!r}; it is for "
            f"{', '.join(kinds[fault.kind])}"
        )
    if (fault.kind == "layer") != bool(fault.weight):
        raise Refused(
            f"inject.kind={fault.kind!r} with inject.weight={fault.weight!r}: a weight is named "
            f"for kind layer, and for no other"
        )


def _files_first(arguments: Sequence[str]) -> list[str]:
    """The parser lets the later win; what is given on the command line goes over every file,
    wherever it stands."""
    own = [
        a for i, a in enumerate(arguments)
        if a != "--config" and not a.startswith("--config=") and not (i and arguments[i - 1] == "--config")
    ]  # fmt: skip
    if "--config" in arguments[-1:]:
        raise Refused("--config: name a YAML file; configs/ holds some")
    # the parser takes no file that holds nothing
    return [f"--config={file}" for file in _files(arguments) if _table(file)] + own


def _files(arguments: Sequence[str]) -> list[str]:
    return [b for a, b in pairwise(arguments) if a == "--config"] + [
        a[9:] for a in arguments if a.startswith("--config=")
    ]


def _build(kind: Any, values: dict[str, Any]) -> Any:
    hints = get_type_hints(kind)
    return kind(**{key: _built(hints[key], value) for key, value in values.items()})


def _built(hint: Any, value: Any) -> Any:
    if is_dataclass(hint):
        return _build(hint, dict(value))
    if hint == list[Inject]:
        return [fault if is_dataclass(fault) else _build(Inject, dict(fault)) for fault in value]
    return value


def _leaves(kind: Any, prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """key → (type, field)."""
    hints = get_type_hints(kind)
    for f in fields(kind):
        if is_dataclass(hints[f.name]):
            yield from _leaves(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", (hints[f.name], f)


def _given(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Keys, and where each stands."""
    for file in _files(arguments):
        yield from ((key, file) for key in _flat(_table(file)))
    for argument in arguments:
        if argument.startswith("--"):
            yield argument[2:].split("=")[0], "command line"


def _table(file: str) -> dict[str, Any]:
    """What a YAML file holds."""
    try:
        table = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise Refused(f"--config {file}: there is no such file; configs/ holds some") from None
    except OSError as error:
        raise Refused(f"--config {file}: {error.strerror}; configs/ holds some") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refused(f"--config {file} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(table, dict):
        raise Refused(
            f"--config {file} holds a {type(table).__name__}, not keys with values such "
            f"as training: {{lr: 0.1}}"
        )
    for key in (f.name for f in fields(Config) if is_dataclass(get_type_hints(Config)[f.name])):
        if not isinstance(table.get(key, {}), dict):
            raise Refused(
                f"--config {file}: {key} is {table[key]!r}, not keys with values; leave "
                f"it out, or write {key}: {{...}}"
            )
    return table


def _flat(table: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, dict) and f"{prefix}{key}" != "clip.options":
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _shortened(text: str) -> str:
    """jsonargparse's errors in one line, without Python's way to write types."""
    text = re.sub(r"<class '(\w+)'>", r"\1", " ".join(text.split())).replace("typing.", "")
    return re.sub(
        r'^Parser key "(.*?)": Expected an? (.*)\. Got value: (.*)$',
        r"\1: expected \2, "
        r"got \3",
        text,
    )
