"""Lightning: a callback for `Trainer`, and `prepare` for `Fabric.clip_gradients`.

    trainer = Trainer(strategy="ddp", callbacks=[GradientClipping(max_norm=1.0)])  # and no
    gradient_clip_val

    model, optimizer = fabric.setup(model, optimizer)
    clipper = prepare(fabric, model, max_norm=1.0)
    ...
    fabric.clip_gradients(model, optimizer, max_norm=1.0)  # as before

Written against lightning 2.6. It uses the private `_after_closure` of precision plugins, and checks
that it exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from distclip import ClipReport, ConfigError, FixedValue, GradClipper, Policy
from distclip.integrations import raise_missing_extra
from distclip.integrations.clipping_scope import ClippingScope, PreparedModels
from distclip.integrations.deferred_scaler_update import DeferredScalerUpdate
from distclip.integrations.joined_ranks import join_all_ranks
from distclip.integrations.set_aside import params_of, set_aside, stepped_by

try:
    from lightning.fabric import Fabric
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise_missing_extra(error, "lightning")

_MOST_BOUNDS = (
    16  # clippers for values that are kept: a new bound at every step must not accumulate them
)


class GradientClipping(Callback):
    """Clips before each optimizer step, in automatic and in manual optimization; under a GradScaler
    after unscaling.

    One process, DDP and FSDP2 (`ModelParallelStrategy`). The norm is that of the parameters that
    the optimizer holds at this step, with several optimizers a norm for each: parameters that no
    optimizer steps do not count, and a param group that is added later does. Accumulated batches
    cost nothing: the hook runs only at steps. The state is saved in Lightning's checkpoints.
    `log=True` logs
    `grad_norm` and `clip_coef` (the smallest, where there are groups); `clippers[0].last_report`
    has the rest.

    Searches (`Tuner.lr_find`, `Tuner.scale_batch_size` and their callbacks), which run without
    callbacks, are clipped as the fit is: by clippers of their own, which start with the state of
    the fit's, do not change it, and write to no sink.

    Args:
        max_norm, policy, options: those of `GradClipper`.
        log: whether to log through `pl_module.log_dict` at each step.

    Raises:
        ConfigError: when fitting starts: the Trainer or the module clips too, there are two such
            callbacks, or the strategy takes the step itself (DeepSpeed: use
            `distclip.integrations.deepspeed`). At a step: the module calls `self.clip_gradients`,
            which would clip a second time.
    """

    def __init__(
        self,
        max_norm: float | None = None,
        *,
        policy: Policy | None = None,
        log: bool = True,
        **options: Any,
    ) -> None:
        _refuse_grad_of(options)
        self.max_norm, self.policy, self.log, self.options = max_norm, policy, log, options
        self.clippers: list[GradClipper] = []
        self._fitting = False
        self._saved_states: list[
            dict[str, Any]
        ] = []  # of a checkpoint, until the clippers are built
        # the callbacks of a search, and its clippers
        self._search: tuple[list[Callback], list[GradClipper]] | None = None
        # by the optimizer's position: its param groups, and the parameters in none of them
        self._rest_of_model: dict[int, tuple[object, list[Tensor]]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._refuse_two_clips(trainer, pl_module)
        self.clippers, self._fitting, self._search = [], False, None
        _PluginGuard.install(self, trainer)

    def _refuse_two_clips(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.gradient_clip_val:
            raise ConfigError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) clips too; leave it out, "
                f"GradientClipping(max_norm=...) is enough"
            )
        if (
            type(pl_module).configure_gradient_clipping
            is not LightningModule.configure_gradient_clipping
        ):
            raise ConfigError(
                f"{type(pl_module).__name__}.configure_gradient_clipping may clip too; take it "
                f"out: GradientClipping is enough"
            )
        if sum(isinstance(callback, GradientClipping) for callback in _callbacks_of(trainer)) > 1:
            raise ConfigError(
                "this Trainer has two GradientClipping callbacks; pass one, it clips "
                "every optimizer"
            )
        _refuse_deepspeed(trainer.strategy, "trainer.model")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clippers = self._build_clippers(trainer, pl_module, self.options)
        self._fitting, self._search, self._rest_of_model = True, None, {}
        saved, self._saved_states = self._saved_states, []
        _load_states(self.clippers, saved)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._search = None
        index, report = self._clip_optimizer(self.clippers, trainer, pl_module, optimizer)
        if self.log:
            suffix = f"_{index}" if len(self.clippers) > 1 else ""
            metrics = {
                f"grad_norm{suffix}": report.total_norm,
                f"clip_coef{suffix}": report.coefs.min(),
            }
            pl_module.log_dict(metrics, on_step=True, on_epoch=False)

    def clip_in_search(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Clip at a step of a search, which has replaced the Trainer's callbacks by its own. Its
        first step is a collective set-up."""
        if self._search is None or self._search[0] is not _callbacks_of(trainer):
            clippers = self._build_clippers(trainer, pl_module, self.options | {"sinks": ()})
            _load_states(clippers, self.state_dict()["clippers"])
            self._search, self._rest_of_model = (_callbacks_of(trainer), clippers), {}
        self._clip_optimizer(self._search[1], trainer, pl_module, optimizer)

    def _build_clippers(
        self, trainer: Trainer, pl_module: LightningModule, options: dict[str, Any]
    ) -> list[GradClipper]:
        """A clipper of the whole model for each optimizer."""
        model = trainer.strategy.model or pl_module
        options = _options_on(trainer.strategy, options)
        return [
            GradClipper(model, self.max_norm, policy=self.policy, **options)
            for _ in trainer.optimizers
        ]

    def _clip_optimizer(
        self,
        clippers: list[GradClipper],
        trainer: Trainer,
        pl_module: LightningModule,
        optimizer: Optimizer,
    ) -> tuple[int, ClipReport]:
        """Clip with one all-reduce; returns the optimizer's position and the report."""
        index = next(
            (i for i, known in enumerate(trainer.optimizers) if known is optimizer), len(clippers)
        )
        if index >= len(clippers):
            raise ConfigError(
                f"a step of an optimizer ({type(optimizer).__name__}) that was not there when "
                "training began; return all optimizers from configure_optimizers"
            )
        groups = tuple(
            (id(group["params"]), len(group["params"])) for group in optimizer.param_groups
        )
        if index not in self._rest_of_model or self._rest_of_model[index][0] != groups:
            held = stepped_by(optimizer)
            others = [
                param
                for param in params_of([trainer.strategy.model or pl_module])
                if id(param) not in held
            ]
            self._rest_of_model[index] = groups, others
        with set_aside(self._rest_of_model[index][1]):
            return index, clippers[index].clip_(
                optimizer, getattr(trainer.precision_plugin, "scaler", None)
            )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._saved_states = []
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._fitting, self._search, self._rest_of_model = False, None, {}
            _PluginGuard.remove(trainer.precision_plugin)

    def state_dict(self) -> dict[str, Any]:
        return {
            "clippers": [clipper.state_dict() for clipper in self.clippers] or self._saved_states
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._fitting:  # a search within the fit restores the state from before it
            _load_states(self.clippers, state_dict["clippers"])
        else:
            self._saved_states = state_dict["clippers"]


def _callbacks_of(trainer: Any) -> list[Callback]:
    return trainer.callbacks  # an attribute that Trainer does not declare


def _load_states(clippers: list[GradClipper], states: list[dict[str, Any]]) -> None:
    if states and len(states) != len(clippers):
        raise ConfigError(
            f"the checkpoint has clippers of {len(states)} optimizers, this run has {len(clippers)}"
        )
    for clipper, state in zip(clippers, states):
        clipper.load_state_dict(state)


@dataclass
class _PluginGuard:
    """Replaces a precision plugin's `_after_closure` and `clip_gradients` during a callback's
    fit."""

    callback: GradientClipping
    trainer: Trainer
    own: Callable[..., None]  # the plugin's

    @classmethod
    def install(cls, callback: GradientClipping, trainer: Trainer) -> None:
        plugin: Any = trainer.precision_plugin
        if not hasattr(plugin, "_after_closure"):
            raise ConfigError(
                f"{type(plugin).__name__} has no _after_closure, by which distclip clips in "
                "searches; distclip was written against lightning 2.6"
            )
        cls.remove(plugin)
        plugin._after_closure = _SearchClipping(callback, trainer, plugin._after_closure)
        plugin.clip_gradients = _SecondClipRefusal(callback, trainer, plugin.clip_gradients)

    @staticmethod
    def remove(plugin: Any) -> None:
        for name in ("_after_closure", "clip_gradients"):
            if isinstance(vars(plugin).get(name), _PluginGuard):
                delattr(plugin, name)


class _SearchClipping(_PluginGuard):
    """Clips between unscaling and the hooks before a step, since a search runs without the
    callback."""

    def __call__(self, model: LightningModule, optimizer: Optimizer) -> None:
        if self.callback not in _callbacks_of(self.trainer):
            self.callback.clip_in_search(self.trainer, model, optimizer)
        self.own(model, optimizer)


class _SecondClipRefusal(_PluginGuard):
    """Refuses `LightningModule.clip_gradients`, which passes a `clip_val` of 0 where there is
    nothing to clip."""

    def __call__(
        self, optimizer: Optimizer, clip_val: float = 0.0, *args: Any, **kwargs: Any
    ) -> None:
        if clip_val > 0:
            name = type(self.trainer.lightning_module).__name__
            raise ConfigError(
                f"{name} calls self.clip_gradients(gradient_clip_val={clip_val}) and "
                "GradientClipping clips too: the norm that is measured second is that of clipped "
                "gradients. Take the call out, and give GradientClipping(max_norm=...) its "
                "threshold (policy=distclip.FixedValue(...) for gradient_clip_algorithm='value')"
            )
        self.own(optimizer, clip_val, *args, **kwargs)


def prepare(
    fabric: Fabric,
    *modules: nn.Module,
    max_norm: float | None = None,
    policy: Policy | None = None,
    **options: Any,
) -> GradClipper:
    """A clipper for `modules`, as `fabric.setup` returned them, which `fabric.clip_gradients` uses
    from now on. A collective.

    `fabric.clip_gradients(module, optimizer, max_norm=...)` must be given the `max_norm` and
    `norm_type` of this clipper (any under a `policy`); `clip_val=` works on sharded modules too. As
    in Fabric it measures and clips exactly what `optimizer` holds at this call: several optimizers
    of one module by a norm each, which a `policy` cannot do. The clipper that is returned is that
    of the first optimizer; others get one at their first call, which is a collective. A second
    `prepare` for a module replaces the first one's clipper. A step that is not finite is skipped on
    all
    ranks; `error_if_nonfinite=True`, which is not the default here, raises instead. Under fp16 the
    scaler is updated once a round, when the next loss is scaled.

    Raises:
        ConfigError: no module was given, or an option or strategy that cannot be honoured.
    """
    if not modules:
        raise ConfigError(
            "prepare(fabric, module, max_norm=...) needs the module that fabric.setup returned"
        )
    _refuse_grad_of(options)
    _refuse_deepspeed(fabric.strategy, "module")
    options = _options_on(fabric.strategy, options)
    clipper = GradClipper(list(modules), max_norm, policy=policy, **options)
    scope = _FabricScope.behind(fabric.clip_gradients) or _FabricScope(fabric)
    scope.add_prepared(
        _PreparedClippers(
            modules,
            max_norm,
            float(options.get("norm_type", 2.0)),
            options,
            [_OptimizerClipper(clipper)],
        )
    )
    fabric.clip_gradients = scope.clip_gradients
    return clipper


@dataclass
class _OptimizerClipper:
    """The clipper for one of several optimizers of the same modules."""

    clipper: GradClipper
    held: frozenset[int] = frozenset()  # what the optimizer held at its last call, by identity


@dataclass
class _PreparedClippers(PreparedModels):
    parts: list[_OptimizerClipper]  # the clipper that was returned is the first one's
    values: dict[float, GradClipper] = field(default_factory=dict[float, GradClipper])

    def has_module(self, module: nn.Module) -> bool:
        """Whether `module` is one of these, also without Fabric's wrapper: a LightningModule under
        Fabric passes itself."""
        return any(module is own or module is getattr(own, "module", None) for own in self.modules)

    def check_norm(self, max_norm: float | None, norm_type: float) -> None:
        if self.max_norm is not None and not self.has_norm(max_norm, norm_type):
            raise ConfigError(
                f"clip_gradients was called with max_norm={max_norm}, norm_type={norm_type:g}, but "
                f"distclip was prepared with max_norm={self.max_norm}, "
                f"norm_type={self.norm_type:g}; make them equal"
            )

    def rest_of_modules(self, held: Mapping[int, Tensor]) -> list[Tensor]:
        """The modules' parameters that the optimizer does not hold."""
        own = self.params_by_id()
        num_unknown = len(held.keys() - own.keys())
        if num_unknown:
            raise ConfigError(
                f"clip_gradients: the optimizer holds {num_unknown} parameters of other modules, "
                "which Fabric would clip with these; prepare all its modules together: "
                "prepare(fabric, module, other, max_norm=...)"
            )
        return [param for i, param in own.items() if i not in held]

    def clipper_for(self, held: frozenset[int]) -> GradClipper:
        """The clipper of the optimizer that holds these parameters now; some may have been added or
        removed since its last call."""
        for part in self.parts:
            if not (part.held and held) or not part.held.isdisjoint(held):
                part.held = held
                return part.clipper
        if self.max_norm is None:
            raise ConfigError(
                "clip_gradients: a second optimizer steps another part of the module, which has "
                "no policy of its own; prepare the module with max_norm=, or each part as a module"
            )
        self.parts.append(
            _OptimizerClipper(GradClipper(list(self.modules), self.max_norm, **self.options), held)
        )
        return self.parts[-1].clipper

    def value_clipper(self, bound: float) -> GradClipper:
        if bound not in self.values:
            if len(self.values) >= _MOST_BOUNDS:
                self.values.clear()
            options = self.options_without("groups", "sinks")
            self.values[bound] = GradClipper(
                list(self.modules), policy=FixedValue(bound), **options
            )
        return self.values[bound]


class _FabricScope(ClippingScope[_PreparedClippers]):
    """What stands behind a fabric's `clip_gradients`."""

    def __init__(self, fabric: Fabric) -> None:
        super().__init__()
        scaler = getattr(fabric.strategy.precision, "scaler", None)
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        if self.scaler is not None:
            self.deferred_update = DeferredScalerUpdate(self.scaler)

    def add_prepared(self, new: _PreparedClippers) -> None:
        """Add `new`; it replaces those that have one of its modules."""
        self.prepared = [
            old
            for old in self.prepared
            if not any(old.has_module(module) for module in new.modules)
        ]
        self.prepared.append(new)

    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Any,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Tensor | None:
        """See `prepare`. One all-reduce. Returns the norm before clipping, a 0-dim tensor, or None
        with `clip_val`."""
        if (clip_val is None) == (max_norm is None):
            raise ConfigError("clip_gradients: pass exactly one of clip_val and max_norm")
        prepared = next((known for known in self.prepared if known.has_module(module)), None)
        if prepared is None:
            raise ConfigError(
                "clip_gradients: distclip does not know this module; call prepare(fabric, module, "
                "max_norm=...) for it"
            )
        held = stepped_by(optimizer)
        others = prepared.rest_of_modules(held)
        if clip_val is not None:
            clipper = prepared.value_clipper(float(clip_val))
        else:
            prepared.check_norm(max_norm, float(norm_type))
            clipper = prepared.clipper_for(frozenset(held))
        report, _ = self.clip_without(others, clipper, optimizer, self.scaler)
        if error_if_nonfinite and bool(report.nonfinite):
            raise RuntimeError(
                f"the norm of the gradients is {float(report.total_norm)}; nothing "
                f"was stepped (error_if_nonfinite=True)"
            )
        return None if clip_val is not None else report.total_norm


def _refuse_grad_of(options: dict[str, Any]) -> None:
    if "grad_of" in options:
        raise ConfigError(
            "grad_of=: Lightning steps what is in .grad; use GradClipper itself for "
            "gradients that are elsewhere"
        )


def _options_on(strategy: Any, options: dict[str, Any]) -> dict[str, Any]:
    """`options`, and that the ranks of a `ModelParallelStrategy` work on the same modules."""
    return join_all_ranks(options) if "ModelParallel" in type(strategy).__name__ else options


def _refuse_deepspeed(strategy: Any, engine: str) -> None:
    name = type(strategy).__name__
    if "DeepSpeed" in name:
        raise ConfigError(
            f"{name}: DeepSpeed steps by itself; call "
            f"distclip.integrations.deepspeed.attach({engine}, ...)"
        )
