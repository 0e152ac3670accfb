"""torchtitan: distclip clips in place of `dist_utils.clip_grad_norm_`, inside the trainer's step.

    trainer = config.build()
    clip_with_distclip(trainer)  # the only new line
    trainer.train()

Without a line of code, where the job is started by `torchtitan.train`:

    ... -m torchtitan.train --module llama3 --config llama3_8b \\
        --override.imports distclip.integrations.torchtitan.clip

Written against torchtitan 0.3.0. What it uses of the trainer stands in `_NEEDED` and
`_clips_in_step`, and is checked when it is attached.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import Tensor

from distclip import ClipReport, ConfigError, GradClipper, Policy
from distclip.integrations import raise_missing_extra

try:
    import torchtitan  # pyright: ignore[reportMissingImports]
    from torchtitan.components.checkpointer import BaseCheckpointManager  # pyright: ignore[reportMissingImports]
    from torchtitan.config.override import override  # pyright: ignore[reportMissingImports]
    from torchtitan.distributed import utils as dist_utils  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    raise_missing_extra(error, "torchtitan")

_NEEDED = ("config.training.max_norm", "model_parts", "optimizers.step", "metrics_processor.log")
_STATE = "distclip"  # its name in the trainer's checkpoints
_REFUSED = ("grad_of", "process_group")


def clip_with_distclip(
    trainer: Any, *, policy: Policy | None = None, **options: Any
) -> GradClipper:
    """Let distclip clip in `trainer.train_step` from now on. A collective: on all ranks, after
    `config.build()` and before `trainer.train()`.

    FSDP2, HSDP, replicas, tensor, context, pipeline and expert parallelism: the parameters' meshes
    say how they are spread. One all-reduce a step. The threshold is the config's
    `training.max_norm`.

    * The optimizers container is stepped by its own `step`, once, with the hooks on it (MoE's
      load balancing). At a step that is not finite it is not stepped on any rank, so that
      `expert_bias` stays what it was, too.
    * `grad_norm` in torchtitan's log is the report's `total_norm`; `distclip/clip_coef` (the
      smallest, where there are groups), `distclip/clip_rate` and `distclip/skips` are logged beside
      it. The report is `clipper.last_report`.
    * The clipper is saved in the trainer's checkpoints as `distclip`. To resume from one that has
      none, name it in `checkpoint.exclude_from_loading`.
    * Gradients that tensor parallelism leaves as partial sums are reduced first
      (`partial_grads="reduce"`), as torch's own norm does.

    Args:
        policy: decides in place of `training.max_norm`.
        options: those of `GradClipper`.

    Returns:
        The clipper.

    Raises:
        ConfigError: this trainer has a clipper already, its step does not call
            `dist_utils.clip_grad_norm_`, or this version of torchtitan keeps things elsewhere.
    """
    scope = _attach(trainer, policy, options)
    scope.save_with(trainer.checkpointer)
    return scope.clipper


def release(trainer: Any) -> None:
    """torchtitan clips by itself again."""
    scope = _TrainerScope.of(trainer)
    if scope is not None:
        scope.give_back()


@override(  # pyright: ignore[reportUntypedFunctionDecorator]
    target=BaseCheckpointManager.Config,
    description="Clip gradients by distclip; keyword arguments are GradClipper's options",
)
def clip(config: Any, **options: Any) -> Any:
    """For `--override.imports`: `clip_with_distclip` for a trainer that one does not build oneself.

    The trainer passes itself to its checkpoint manager, which is built last; distclip is attached
    there, whether or not checkpoints are enabled. Options are given as JSON:
    `distclip.integrations.torchtitan.clip={"on_nonfinite": "raise"}`.
    """
    kind = type(config)
    attaching: Any = dataclass(kw_only=True, slots=True)(type("Config", (kind,), {}))
    attaching._owner = partial(_build_checkpointer, kind._owner, options)
    return attaching(**{field.name: getattr(config, field.name) for field in fields(config)})


def _build_checkpointer(
    owner: Callable[..., Any], options: dict[str, Any], **arguments: Any
) -> Any:
    checkpointer = owner(**arguments)
    trainer = arguments.get("states", {}).get("train_state")
    if trainer is None:
        raise ConfigError(
            "the checkpoint manager was not given the trainer as states['train_state']; call "
            "clip_with_distclip(trainer) instead of the override"
        )
    _attach(trainer, None, options).save_with(checkpointer)
    return checkpointer


def _attach(trainer: Any, policy: Policy | None, options: dict[str, Any]) -> _TrainerScope:
    if _TrainerScope.of(trainer) is not None:
        raise ConfigError("this trainer is clipped by distclip already; attach it once")
    for name in options:
        if name in _REFUSED:
            raise ConfigError(
                f"{name}= cannot be honoured: torchtitan steps what is in .grad, on all its ranks"
            )
    lacking = [name for name in _NEEDED if not _has(trainer, name)]
    if lacking:
        raise ConfigError(
            f"torchtitan {torchtitan.__version__}: {type(trainer).__name__} has no "
            f"{', '.join(lacking)}, which distclip needs; it was written against torchtitan 0.3.0"
        )
    if not _clips_in_step(trainer):
        raise ConfigError(
            f"train_step of {type(trainer).__name__} does not call dist_utils.clip_grad_norm_, "
            "whose place distclip takes; call clipper.step(self.optimizers) there instead"
        )
    max_norm = float(trainer.config.training.max_norm)
    options = {"partial_grads": "reduce"} | options
    own_norm = max_norm if policy is None else None
    clipper = GradClipper(trainer.model_parts, own_norm, policy=policy, **options)
    return _TrainerScope(trainer, clipper, max_norm)


def _has(thing: Any, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(thing, name):
            return False
        thing = getattr(thing, name)
    return True


def _clips_in_step(trainer: Any) -> bool:
    """Whether a `train_step` of its classes calls the function whose place distclip takes."""
    steps = [
        vars(kind)["train_step"] for kind in type(trainer).__mro__ if "train_step" in vars(kind)
    ]
    return hasattr(dist_utils, "clip_grad_norm_") and any(
        "clip_grad_norm_" in function.__code__.co_names
        and function.__globals__.get("dist_utils") is dist_utils
        for function in map(inspect.unwrap, steps)
    )


class _TrainerScope:
    """What stands behind a trainer's `train_step` while distclip clips there."""

    def __init__(self, trainer: Any, clipper: GradClipper, max_norm: float) -> None:
        self.trainer, self.clipper, self.max_norm = trainer, clipper, max_norm
        self._states: dict[str, Any] | None = None  # of the checkpointer
        self._train_step, self._optimizer_step = trainer.train_step, trainer.optimizers.step
        self._log = trainer.metrics_processor.log
        self._params = {id(param) for part in trainer.model_parts for param in part.parameters()}
        self._report: ClipReport | None = None  # of this step
        trainer.train_step = self.train_step

    @classmethod
    def of(cls, trainer: Any) -> _TrainerScope | None:
        owner = getattr(vars(trainer).get("train_step"), "__self__", None)
        return owner if isinstance(owner, cls) else None

    def save_with(self, checkpointer: Any) -> None:
        if not checkpointer.enable:
            return
        self._states = getattr(checkpointer, "states", None)
        if self._states is None:
            raise ConfigError(
                f"{type(checkpointer).__name__} has no `states` to save the clipper in; distclip "
                "was written against torchtitan 0.3.0"
            )
        self._states[_STATE] = self.clipper

    def give_back(self) -> None:
        """Restore the trainer's own step."""
        del self.trainer.train_step
        if self._states is not None:
            self._states.pop(_STATE, None)

    def train_step(self, data_iterator: Any) -> Any:
        self._report = None
        with (
            _replaced(dist_utils, "clip_grad_norm_", self.clip_grad_norm_),
            _replaced(self.trainer.optimizers, "step", self.step_once),
            _replaced(self.trainer.metrics_processor, "log", self.log),
        ):
            result = self._train_step(data_iterator)
        if self._report is None:
            raise ConfigError(
                f"train_step of {type(self.trainer).__name__} ended without a clip: it steps "
                "gradients that distclip never saw"
            )
        return result

    def clip_grad_norm_(
        self,
        parameters: Tensor | Iterable[Tensor],
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
        **_: Any,  # meshes and flags, which the parameters themselves tell
    ) -> Tensor:
        """Clip and step; `optimizers.step`, which follows, has then nothing left to do."""
        given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if {id(param) for param in given} != self._params:
            raise ConfigError(
                "train_step clips other parameters than those of trainer.model_parts, with which "
                "distclip was attached; attach it after the model has its last parameters"
            )
        if self._report is not None:
            raise ConfigError("train_step clips twice in one step; distclip steps at the first")
        if float(max_norm) != self.max_norm:
            raise ConfigError(
                f"training.max_norm was {self.max_norm:g} when distclip was attached and is now "
                f"{max_norm:g}; for a threshold that changes pass policy=distclip.Scheduled(...)"
            )
        self.trainer.checkpointer.maybe_wait_for_staging()  # parameters change here
        with _replaced(self.trainer.optimizers, "step", self._optimizer_step):
            self._report = self.clipper.step(self.trainer.optimizers)
        return self._report.total_norm

    def step_once(self) -> None:
        """In the place of the container's `step`: the clip took the step, or skipped it."""
        if self._report is None:
            raise ConfigError(
                f"train_step of {type(self.trainer).__name__} steps before it clips; distclip "
                "cannot clip such a step"
            )

    def log(self, step: int, *args: Any, extra_metrics: Any = None, **kwargs: Any) -> None:
        report = self._report
        if report is not None:
            extra_metrics = (extra_metrics or {}) | {
                "distclip/clip_coef": float(report.coefs.min()),
                "distclip/clip_rate": float(report.clip_rate),
                "distclip/skips": int(report.skips),
            }
        self._log(step, *args, extra_metrics=extra_metrics, **kwargs)


@contextmanager
def _replaced(thing: Any, name: str, value: Any) -> Generator[None]:
    """Within this context `thing.name` is `value`; then what it was, on the object or its class."""
    own = vars(thing)
    before = own.get(name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(thing, name)
        else:
            setattr(thing, name, before)
