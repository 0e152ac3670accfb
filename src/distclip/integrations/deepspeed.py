"""DeepSpeed: distclip's norm and policy decide inside `engine.step()`.

    engine, *_ = deepspeed.initialize(model=model, config=config)  # "gradient_clipping": 0.0
    clipper = attach(engine, max_norm=1.0)
    ...
    engine.backward(loss)
    engine.step()  # as before

Written against DeepSpeed 0.19; all use of DeepSpeed's internals is in `deepspeed_internals/`, and
their presence is checked here.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from distclip import PRIVATE, ConfigError, GradClipper, Policy
from distclip.integrations import raise_missing_extra
from distclip.integrations.deepspeed_internals import (
    ADAPTERS,
    NEEDED_OF_ENGINE,
    EngineAdapter,
    adapter_for,
    missing_names,
    own_clipping,
    unsupported_features,
    unsupported_sharded_features,
)

try:
    import deepspeed
except ModuleNotFoundError as error:
    raise_missing_extra(error, "deepspeed")

_ATTACH_OPTIONS = ("norm_type", "groups", "on_nonfinite", "drift_tolerance", "skip_limit", "sinks")


def attach(
    engine: Any,
    max_norm: float | None = None,
    *,
    policy: Policy | None = None,
    take_over: bool = False,
    **options: Any,
) -> GradClipper:
    """A clipper that `engine.step()` uses from now on. A collective, on all ranks, after
    `deepspeed.initialize`.

    ZeRO 0, 1, 2 and 3, with and without offload of the optimizer to the CPU; float32, bfloat16 and
    float16; DeepSpeed's `MoE` layers, with experts of any number of ranks; its pipeline engine,
    where `train_batch` steps; several engines, each with a clipper of its own. One all-reduce in
    place of DeepSpeed's own norm and overflow check. Gradients are measured where DeepSpeed keeps
    them and multiplied once, in float32, by coefficient and inverse loss scale together. Experts
    have the names that they have in DeepSpeed's checkpoints, numbered over all ranks.

    A step that is not finite lowers a dynamic loss scale as usual; one that a policy skips
    (`SkipSpikes`) does not. Either counts in `engine.skipped_steps`, and advances no learning-rate
    scheduler.

    `engine.get_global_grad_norm()` is the report's `total_norm`, and inf at a step that is not
    finite, as in DeepSpeed (the report distinguishes NaN from inf); the report itself is
    `clipper.last_report`. Save `clipper.state_dict()` in `client_state` of
    `engine.save_checkpoint`.

    Args:
        take_over: set the engine's own clipping to 0 instead of refusing an engine that clips too.
        options: `norm_type`, `groups`, `on_nonfinite`, `drift_tolerance`, `skip_limit`, `sinks` of
            `GradClipper`. Groups are by the model's parameter names;
            `per_param_group(engine.optimizer)` by DeepSpeed's param groups.

    Raises:
        ConfigError: the engine clips too; it has an optimizer, a layout or a version of DeepSpeed
            that is not supported.
    """
    for name in options:
        if name not in _ATTACH_OPTIONS:
            raise ConfigError(
                f"attach(engine, ..., {name}=): DeepSpeed decides that; the options "
                f"are {', '.join(_ATTACH_OPTIONS)}"
            )
    if getattr(engine, "_distclip", None) is not None:
        raise ConfigError("this engine has a clipper already; attach one only")
    kind = _checked_kind(engine)
    if (own := own_clipping(engine)) and not take_over:
        raise ConfigError(
            f'this engine also clips: its "gradient_clipping" is {own:g} (DeepSpeed sets it where '
            'a config does not). Write "gradient_clipping": 0.0 into the DeepSpeed config, or '
            "attach(engine, ..., take_over=True)"
        )
    adapter = kind(engine)
    if engine.fp16_enabled() and options.get("on_nonfinite") == "propagate":
        raise ConfigError(
            "on_nonfinite='propagate' and fp16 exclude each other: steps that "
            "overflow must be skipped; use 'skip'"
        )
    grouping = options.pop("groups", None)
    if _is_grouping(grouping):  # what is none the clipper refuses
        grouping = _OriginalGrouping(grouping, adapter)
    clipper = GradClipper(
        [(part.name, part.master) for part in adapter.parts],
        max_norm,
        policy=policy,
        grad_of=adapter.grad_of,
        groups=grouping,
        replicated_over={"*": PRIVATE} if kind.sharded else None,
        **options,
    )
    adapter.install(clipper)
    return clipper


def detach(engine: Any) -> None:
    """Give the engine its own step and its own clipping back. Sends nothing.

    Raises:
        ConfigError: it has no clipper.
    """
    adapter: EngineAdapter | None = getattr(engine, "_distclip", None)
    if adapter is None:
        raise ConfigError("this engine has no clipper; attach(engine, ...) gives one")
    adapter.remove()


def _checked_kind(engine: Any) -> type[EngineAdapter]:
    """The adapter's class. ConfigError unless distclip supports the engine, its optimizer, its
    layout and this version of DeepSpeed."""
    _refuse_missing(missing_names(engine, NEEDED_OF_ENGINE))
    _refuse_unsupported(unsupported_features(engine))
    kind = adapter_for(engine)
    if kind is None:
        raise ConfigError(
            f"the engine's optimizer is a {type(engine.optimizer).__name__}; "
            f"distclip knows {', '.join(ADAPTERS)}"
        )
    if kind.sharded:
        _refuse_unsupported(unsupported_sharded_features(engine))
    _refuse_missing(missing_names(engine.optimizer, kind.needed_names))
    _refuse_unsupported(kind.unsupported_features(engine.optimizer))
    return kind


def _refuse_unsupported(found: Sequence[str]) -> None:
    if found:
        what, _, instead = found[0].partition("; ")
        raise ConfigError(
            f"attach: this engine has {what}, which distclip does not support under "
            f"DeepSpeed: {instead}"
        )


def _refuse_missing(lost: Sequence[str]) -> None:
    if lost:
        raise ConfigError(
            f"DeepSpeed {deepspeed.__version__} has no {', '.join(lost)}, which distclip needs; it "
            f"was written against DeepSpeed 0.19"
        )


class _OriginalGrouping:
    """Passes the model's parameters to a grouping; the clipper's own parameters are parts of
    DeepSpeed's flat float32 copies."""

    def __init__(self, grouping: Any, adapter: EngineAdapter) -> None:
        self.grouping, self.adapter = grouping, adapter

    def assign(self, names: Sequence[str], params: Sequence[Tensor]) -> list[str]:
        with self._original(params) as originals:
            return self.grouping.assign(names, originals)

    @contextmanager
    def _original(self, params: Sequence[Tensor]) -> Generator[list[Tensor]]:
        """Within it the param groups hold the model's parameters: those of `params`."""
        original = {id(part.master): part.param for part in self.adapter.parts}
        with self.adapter.original_param_groups():
            yield [original[id(master)] for master in params]

    def rules(self) -> Mapping[str, Any]:
        return self.grouping.rules()

    def patterns(self) -> Sequence[str]:
        return self.grouping.patterns()

    def needs(self, params: Sequence[Tensor]) -> Mapping[str, int]:
        with self._original(params) as originals:
            return self.grouping.needs(originals)

    def cuts(self, names: Sequence[str]) -> Sequence[bool]:
        return self.grouping.cuts(names)

    def __repr__(self) -> str:
        return repr(self.grouping)


def _is_grouping(thing: Any) -> bool:
    asked = [name for name in vars(_OriginalGrouping) if not name.startswith("_")]
    return all(callable(getattr(thing, name, None)) for name in asked)
