"""Lightning: a callback for `Trainer`, and `prepare` for `Fabric.clip_gradients`.

    trainer = Trainer(strategy="ddp", callbacks=[GradientClipping(max_norm=1.0)])  # and no gradient_clip_val

    model, optimizer = fabric.setup(model, optimizer)
    clipper = prepare(fabric, model, max_norm=1.0)
    ...
    fabric.clip_gradients(model, optimizer, max_norm=1.0)  # as before

Written against lightning 2.6.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from distclip import ClipReport, ConfigError, FixedValue, GradClipper, Policy
from distclip.integrations.accelerate import only
from distclip.integrations.scaler_rounds import LaterUpdate


class GradientClipping(Callback):
    """Clips before each optimizer step, in automatic and in manual optimization; under a GradScaler after unscaling.

    One process, DDP and FSDP2 (`ModelParallelStrategy`). The norm is that of the parameters that the optimizer steps, of each its own
    with several optimizers.
    Accumulated batches cost nothing: the hook runs at steps alone. The state goes with Lightning's checkpoints. `log=True` logs
    `grad_norm` and `clip_coef` (the smallest, where there are groups); `clippers[0].last_report` has the rest.

    Args:
        max_norm, policy, options: of `GradClipper`.
        log: through `pl_module.log_dict`, at each step.

    Raises:
        ConfigError: when training starts: the Trainer or the module clips too, or the strategy takes the step out of Lightning's hands
            (DeepSpeed: use `distclip.integrations.deepspeed`).
    """

    def __init__(self, max_norm: float | None = None, *, policy: Policy | None = None, log: bool = True, **options: Any) -> None:
        _refuse_grad_of(options)
        self.max_norm, self.policy, self.log, self.options = max_norm, policy, log, options
        self.clippers: list[GradClipper] = []
        self._saved: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.gradient_clip_val:
            raise ConfigError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) clips too; leave it out, GradientClipping(max_norm=...) is enough"
            )
        if type(pl_module).configure_gradient_clipping is not LightningModule.configure_gradient_clipping:
            raise ConfigError(
                f"{type(pl_module).__name__}.configure_gradient_clipping may clip too; take it out: GradientClipping is enough"
            )
        name = type(trainer.strategy).__name__
        if "DeepSpeed" in name:
            raise ConfigError(f"{name}: DeepSpeed steps by itself; call distclip.integrations.deepspeed.attach(trainer.model, ...)")
        model = trainer.strategy.model or pl_module
        self.clippers = [
            GradClipper(model, self.max_norm, policy=self.policy, **_restricted(model, optimizer), **self.options)
            for optimizer in trainer.optimizers
        ]
        if self._saved:
            if len(self._saved) != len(self.clippers):
                raise ConfigError(f"the checkpoint has clippers of {len(self._saved)} optimizers, this run has {len(self.clippers)}")
            for clipper, state in zip(self.clippers, self._saved, strict=True):
                clipper.load_state_dict(state)
            self._saved = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        index = next(i for i, known in enumerate(trainer.optimizers) if known is optimizer)
        report = self.clippers[index].clip_(optimizer, getattr(trainer.precision_plugin, "scaler", None))
        if self.log:
            suffix = f"_{index}" if len(self.clippers) > 1 else ""
            told = {f"grad_norm{suffix}": report.total_norm, f"clip_coef{suffix}": report.coefs.min()}
            pl_module.log_dict(told, on_step=True, on_epoch=False)

    def state_dict(self) -> dict[str, Any]:
        return {"clippers": [clipper.state_dict() for clipper in self.clippers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict["clippers"]


def prepare(
    fabric: Fabric, *modules: nn.Module, max_norm: float | None = None, policy: Policy | None = None, **options: Any
) -> GradClipper:
    """A clipper for `modules`, as `fabric.setup` returned them, which `fabric.clip_gradients` uses from now on. A collective.

    `fabric.clip_gradients(module, optimizer, max_norm=...)` must be given the `max_norm` and `norm_type` of this clipper (any under a
    `policy`); `clip_val=` works on sharded modules too. As in Fabric it clips what `optimizer` steps: several optimizers of one module
    by a norm each, which a `policy` cannot serve. A step that is not finite is skipped on all ranks; `error_if_nonfinite=True`, which is
    not the default here, raises instead. Under fp16 the scaler is updated once a round, when the next loss is scaled.

    Raises:
        ConfigError: no module was given, or an option that cannot be honoured.
    """
    if not modules:
        raise ConfigError("prepare(fabric, module, max_norm=...) needs the module that fabric.setup returned")
    _refuse_grad_of(options)
    clipper = GradClipper(list(modules), max_norm, policy=policy, **options)
    now = getattr(fabric.clip_gradients, "__self__", None)
    clipping = now if isinstance(now, _Clipping) else _Clipping(fabric)
    for module in modules:
        clipping.clippers[id(module)] = (module, clipper, max_norm, options)
    fabric.clip_gradients = clipping.clip_gradients
    return clipper


class _Clipping:
    """What stands behind a fabric's `clip_gradients`."""

    def __init__(self, fabric: Fabric) -> None:
        self.clippers: dict[int, tuple[nn.Module, GradClipper, float | None, dict[str, Any]]] = {}
        self.parts: dict[tuple[int, frozenset[int], str], tuple[float, GradClipper]] = {}  # for one optimizer of several, and for values
        scaler = getattr(fabric.strategy.precision, "scaler", None)
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.later = None if self.scaler is None else LaterUpdate(self.scaler)

    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Any,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Tensor | None:
        """See `prepare`. One all-reduce; the norm before clipping, a 0-dim tensor, or None with `clip_val`."""
        if (clip_val is None) == (max_norm is None):
            raise ConfigError("clip_gradients: pass exactly one of clip_val and max_norm")
        if id(module) not in self.clippers:
            raise ConfigError("clip_gradients: distclip does not know this module; call prepare(fabric, module, max_norm=...) for it")
        _, clipper, known, options = self.clippers[id(module)]
        if clip_val is not None:
            clipper = self._of(module, optimizer, "value", float(clip_val), {"policy": FixedValue(float(clip_val))})
        elif known is not None and (max_norm != known or float(norm_type) != float(options.get("norm_type", 2.0))):
            raise ConfigError(
                f"clip_gradients was called with max_norm={max_norm}, norm_type={norm_type:g}, but distclip was prepared with "
                f"max_norm={known}, norm_type={float(options.get('norm_type', 2.0)):g}; make them equal"
            )
        elif _restricted(module, optimizer):
            if known is None:
                raise ConfigError(
                    "clip_gradients: this optimizer steps a part of the module, which has no policy of its own; prepare the module with "
                    "max_norm=, or each part as a module"
                )
            clipper = self._of(module, optimizer, "norm", known, {"max_norm": known})
        with nullcontext() if self.later is None else self.later.clipping():
            report: ClipReport = clipper.clip_(optimizer, self.scaler)
        if error_if_nonfinite and bool(report.nonfinite):
            raise RuntimeError(f"the norm of the gradients is {float(report.total_norm)}; nothing was stepped (error_if_nonfinite=True)")
        return None if clip_val is not None else report.total_norm

    def _of(self, module: nn.Module, optimizer: Any, kind: str, bound: float, rule: dict[str, Any]) -> GradClipper:
        """A clipper for what this optimizer steps; made at the first call, which is a collective, and anew for another bound."""
        key = (id(module), frozenset(map(id, _params(optimizer))), kind)
        if key not in self.parts or self.parts[key][0] != bound:
            rest = {k: v for k, v in self.clippers[id(module)][3].items() if k not in ("groups", "sinks")}
            self.parts[key] = (bound, GradClipper(module, **rule, **_restricted(module, optimizer), **rest))
        return self.parts[key][1]


def _refuse_grad_of(options: dict[str, Any]) -> None:
    if "grad_of" in options:
        raise ConfigError("grad_of=: Lightning steps what is in .grad; use GradClipper itself for gradients that are elsewhere")


def _restricted(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The option by which a clipper of the model sees only what the optimizer steps; none where that is all."""
    params = _params(optimizer)
    stepped = {id(param) for param in params}
    return {} if all(id(p) in stepped for p in model.parameters() if p.requires_grad) else {"grad_of": only(params)}


def _params(optimizer: Any) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]
