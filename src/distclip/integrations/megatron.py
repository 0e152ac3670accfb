"""Megatron-Core: distclip's norm and policy decide inside `optimizer.step()`.

    optimizer = get_megatron_optimizer(config, model)  # OptimizerConfig(clip_grad=0.0)
    clipper = attach(optimizer, model, max_norm=1.0)
    ...
    update_successful, grad_norm, num_zeros_in_grad = optimizer.step()  # as before

Written against Megatron-Core 0.16 to 0.19; all use of its internals is in this file, and their
presence is checked here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distclip import ClipReport, ConfigError, GradClipper, Policy
from distclip.integrations import raise_missing_extra

try:
    from megatron.core import __version__ as MEGATRON
    from megatron.core import parallel_state
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import (
        ChainedOptimizer,
        Float16OptimizerWithFloat16Params,
        FP32Optimizer,
    )
    from megatron.core.process_groups_config import ProcessGroupCollection
except ModuleNotFoundError as error:
    raise_missing_extra(error, "megatron")

_ATTACH_OPTIONS = ("norm_type", "groups", "on_nonfinite", "drift_tolerance", "skip_limit", "sinks")
_MAIN_NORM = "all"  # the group of parameters that Megatron puts into no group of their own
# what Megatron-Core's second copies are copies of
_TIED_TO = "embedding.word_embeddings.weight"
_GROUPS_NEEDED = ("tp", "pp", "ep", "expt_tp", "dp_cp", "expt_dp")

# what each kind of optimizer steps: pairs of lists of groups, the model's parameters and what is
# stepped in their place
_STEPPED = {
    DistributedOptimizer: (
        ("model_float16_groups", "shard_fp32_from_float16_groups"),
        ("model_fp32_groups", "shard_fp32_groups"),
    ),
    Float16OptimizerWithFloat16Params: (
        ("float16_groups", "fp32_from_float16_groups"),
        ("fp32_from_fp32_groups", "fp32_from_fp32_groups"),
    ),
    FP32Optimizer: (),
}


def attach(
    optimizer: Any,
    model: nn.Module | Sequence[nn.Module],
    max_norm: float | None = None,
    *,
    policy: Policy | None = None,
    take_over: bool = False,
    process_groups: Any = None,
    **options: Any,
) -> GradClipper:
    """A clipper that `optimizer.step()` uses from now on. A collective, on all ranks, after
    `get_megatron_optimizer`.

    Nothing is declared by hand: which ranks hold copies is read from Megatron's process groups and
    from its marks on parameters (`tensor_model_parallel`, `allreduce`, `shared`,
    `grad_norm_group`), and which part a rank steps from the distributed optimizer's ranges. One
    all-reduce over all ranks a step, in place of Megatron's of its norm and its check for
    overflow. Main gradients are multiplied once, in float32, by coefficient and inverse loss scale.

    A step that is not finite is left out on all ranks, with or without a loss scale; the scalers
    of all chained optimizers then learn of it alike. A step that a policy skips (`SkipSpikes`)
    lowers no loss scale. `optimizer.step()` returns False for either. The norm that it returns is
    that of the report, without parameters of a `grad_norm_group`, which have a norm of their own as
    in Megatron; the report itself is `clipper.last_report`.

    Args:
        optimizer: Megatron's FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer
            or a ChainedOptimizer of these.
        model: the model's chunks on this rank, as `get_megatron_optimizer` gets them.
        take_over: set `clip_grad` of the optimizer's config to 0 instead of refusing it.
        process_groups: a ProcessGroupCollection with `tp`, `pp`, `ep`, `expt_tp`, `dp_cp` and
            `expt_dp`; by default those of `parallel_state`.
        options: `norm_type`, `groups`, `on_nonfinite`, `drift_tolerance`, `skip_limit`, `sinks` of
            `GradClipper`. Groups are by the model's parameter names; names of layers count from 0
            on each pipeline stage, as Megatron's do.

    Raises:
        ConfigError: the optimizer clips too; it is of a kind, or has a feature, that is not
            supported; parameters are not held as their marks say.
    """
    for name in options:
        if name not in _ATTACH_OPTIONS:
            raise ConfigError(
                f"attach(optimizer, model, ..., {name}=): the options are "
                f"{', '.join(_ATTACH_OPTIONS)}"
            )
    if getattr(optimizer, "_distclip", None) is not None:
        raise ConfigError("this optimizer has a clipper already; attach one only")
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    subs = _checked_subs(optimizer, take_over)
    if process_groups is None:
        if not parallel_state.model_parallel_is_initialized():
            raise ConfigError(
                "attach: Megatron's process groups are not initialised; call "
                "parallel_state.initialize_model_parallel(...) first, or pass process_groups="
            )
        process_groups = ProcessGroupCollection.use_mpu_process_groups(list(_GROUPS_NEEDED))
    if options.get("on_nonfinite") == "propagate" and any(map(_has_dynamic_scale, subs)):
        raise ConfigError(
            "on_nonfinite='propagate' and a dynamic loss scale exclude each other: steps that "
            "overflow must be skipped; use 'skip'"
        )
    parts = _find_parts(subs, chunks, process_groups)
    grouping = _GroupingOfParts(options.pop("groups", None), parts)
    attached = _AttachedOptimizer(optimizer, subs, parts, by_norm_group=grouping.grouping is None)
    attached.clipper = GradClipper(
        [(part.name, part.stand_in) for part in parts],
        max_norm,
        policy=policy,
        grad_of=attached.grad_of,
        groups=grouping,
        **options,
    )
    _check_elements(attached.clipper, parts)
    attached.install()
    return attached.clipper


def detach(optimizer: Any) -> None:
    """Give the optimizer its own `step` and its own clipping back. Sends nothing.

    Raises:
        ConfigError: it has no clipper.
    """
    attached: _AttachedOptimizer | None = getattr(optimizer, "_distclip", None)
    if attached is None:
        raise ConfigError("this optimizer has no clipper; attach(optimizer, model, ...) gives one")
    attached.remove()


def _checked_subs(optimizer: Any, take_over: bool) -> list[Any]:
    """The optimizers that step, in their order. ConfigError where one is not supported."""
    subs: list[Any] = (
        list(optimizer.chained_optimizers) if type(optimizer) is ChainedOptimizer else [optimizer]
    )
    for sub in subs:
        if type(sub) not in _STEPPED:
            known = ", ".join(kind.__name__ for kind in _STEPPED)
            raise ConfigError(
                f"attach: the optimizer is a {type(sub).__name__}; distclip knows {known}, and "
                "ChainedOptimizer of these"
            )
        _refuse_features(sub)
        if sub.config.clip_grad > 0 and not take_over:
            raise ConfigError(
                f"this optimizer also clips: clip_grad of its OptimizerConfig is "
                f"{sub.config.clip_grad:g} (1.0 where a config does not say). Write "
                "OptimizerConfig(clip_grad=0.0), or attach(optimizer, model, ..., take_over=True)"
            )
    return subs


def _refuse_features(sub: Any) -> None:
    config = sub.config
    ddp_config = getattr(sub, "ddp_config", None)
    threshold = getattr(config, "grad_norm_skip_threshold", math.inf)
    found = {
        "use_precision_aware_optimizer; leave it out, so that main gradients are float32": (
            config.use_precision_aware_optimizer
        ),
        "optimizer_cpu_offload; leave it out": config.optimizer_cpu_offload,
        "optimizer_cuda_graph; leave it out": getattr(config, "optimizer_cuda_graph", False),
        f"grad_norm_skip_threshold={threshold:g}; leave it out and pass "
        "policy=distclip.SkipSpikes(...)": math.isfinite(threshold),
        "Megatron-FSDP; use torch's fully_shard with GradClipper(model, ...), or the distributed "
        "optimizer": getattr(ddp_config, "use_megatron_fsdp", False),
        "generalized tensor parallelism (gtp_remat); leave it out": _has_gtp(),
    }
    for text, has in found.items():
        if has:
            what, _, instead = text.partition("; ")
            raise ConfigError(
                f"attach: this optimizer has {what}, which distclip does not support under "
                f"Megatron: {instead}"
            )


def _has_gtp() -> bool:
    sizes = (
        getattr(parallel_state, name, None)
        for name in ("get_gtp_weight_remat_world_size", "get_expert_gtp_weight_remat_world_size")
    )
    return any(size is not None and size() > 1 for size in sizes)


def _has_dynamic_scale(sub: Any) -> bool:
    return bool(sub.config.fp16) and not sub.config.loss_scale


@dataclass(frozen=True, eq=False, slots=True)
class _SteppedPart:
    """What this rank steps of one parameter."""

    name: str  # of the parameter, and which part of it: equal on the ranks that hold copies
    param_name: str  # whose group it is in
    stepped: Tensor  # in the optimizer's param groups
    stand_in: Tensor  # the same memory, for the clipper: what is stepped may be no leaf
    counts: bool  # False for the second copy of a parameter tied over stages
    norm_group: str
    holders: int  # ranks that hold a copy, by Megatron's groups


def _find_parts(
    subs: Sequence[Any], chunks: Sequence[nn.Module], groups: Any
) -> list[_SteppedPart]:
    names = {
        id(param): (number, name)
        for number, chunk in enumerate(chunks)
        for name, param in chunk.named_parameters()
    }
    parts: list[_SteppedPart] = []
    for sub in subs:
        for param, stepped in _stepped_by(sub):
            if id(param) not in names:
                raise ConfigError(
                    f"attach: the optimizer steps a parameter of shape {tuple(param.shape)} that "
                    "is not in the model; pass all chunks of the model"
                )
            number, name = names[id(param)]
            while name.startswith("module."):  # Megatron's DDP and Float16Module
                name = name.removeprefix("module.")
            marks, holders = _held(param, groups)
            if len(chunks) > 1:
                marks.insert(0, f"chunk {number}")
            if type(sub) is DistributedOptimizer:
                of_param = sub._get_model_param_range_map(param)["param"]
                marks.append(f"{of_param.start}:{of_param.end}")
            counts = not getattr(param, "shared", False)
            if not counts:
                marks.append("copy")
            parts.append(
                _SteppedPart(
                    name=f"{name} [{', '.join(marks)}]" if marks else name,
                    param_name=name if counts else _TIED_TO,
                    stepped=stepped,
                    stand_in=stepped.detach(),
                    counts=counts,
                    norm_group=getattr(param, "grad_norm_group", None) or _MAIN_NORM,
                    holders=holders * _num_copies(sub, param, groups),
                )
            )
    return parts


def _stepped_by(sub: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The model's parameters, and what the optimizer steps for each."""
    if sub.is_stub_optimizer:
        return
    if type(sub) is FP32Optimizer:
        for group in sub.optimizer.param_groups:
            yield from zip(group["params"], group["params"])
    for of_model, of_optimizer in _STEPPED[type(sub)]:
        if not hasattr(sub, of_model) or not hasattr(sub, of_optimizer):
            raise ConfigError(
                f"Megatron-Core {MEGATRON} has no {type(sub).__name__}.{of_model} and "
                f".{of_optimizer}, which distclip needs; it was written against 0.16 to 0.19"
            )
        for params, stepped in zip(getattr(sub, of_model), getattr(sub, of_optimizer)):
            yield from zip(params, stepped, strict=True)


def _is_expert(param: Tensor) -> bool:
    return not getattr(param, "allreduce", True)


def _held(param: Tensor, groups: Any) -> tuple[list[str], int]:
    """Along which of Megatron's groups ranks hold different parameters, and this rank's place in
    them; and how many ranks of the tensor-parallel group hold a copy."""
    marks: list[str] = []
    if groups.pp.size() > 1:
        marks.append(f"stage {groups.pp.rank()}")
    if _is_expert(param) and groups.ep.size() > 1:
        marks.append(f"ep {groups.ep.rank()}")
    tensor_group = groups.expt_tp if _is_expert(param) else groups.tp
    if not getattr(param, "tensor_model_parallel", False):
        return marks, tensor_group.size()
    if tensor_group.size() > 1:
        marks.append(f"tp {tensor_group.rank()}")
    return marks, 1


def _num_copies(sub: Any, param: Tensor, groups: Any) -> int:
    """How many ranks hold a copy for data parallelism: with the distributed optimizer one in each
    of its instances."""
    size = int((groups.expt_dp if _is_expert(param) else groups.dp_cp).size())
    return size // sub.data_parallel_group.size() if type(sub) is DistributedOptimizer else size


def _check_elements(clipper: GradClipper, parts: Sequence[_SteppedPart]) -> None:
    """A collective. Copies were found by names; their number must be that of Megatron's groups.

    Raises:
        ConfigError: it is not, on all ranks.
    """
    here = sum(part.stepped.numel() / part.holders for part in parts)
    device = "cpu" if "cpu" in dist.get_backend_config() else "cuda"
    wanted = torch.tensor(here, dtype=torch.float64, device=device)
    dist.all_reduce(wanted)
    found = sum(row.elements for row in clipper.plan.rows)
    if abs(float(wanted) - found) > 0.5:
        raise ConfigError(
            f"attach: by Megatron's process groups the model has {float(wanted):,.0f} elements, "
            f"but its ranks hold {found:,} different ones: tensor-parallel ranks lay out copies "
            "differently, or marks on parameters (tensor_model_parallel, allreduce) are wrong. "
            "print(clipper.plan) of a clipper without copies may help: build the model with "
            "tensor_model_parallel_size=1"
        )


class _GroupingOfParts:
    """Passes the model's names and what is stepped to a grouping; without one, Megatron's groups
    of norms."""

    def __init__(self, grouping: Any, parts: Sequence[_SteppedPart]) -> None:
        self.grouping = grouping
        self._parts = {part.name: part for part in parts}
        self._stepped = {id(part.stand_in): part.stepped for part in parts}

    def assign(self, names: Sequence[str], params: Sequence[Tensor]) -> list[str]:
        parts = [self._parts[name] for name in names]
        if self.grouping is None:
            return [part.norm_group for part in parts]
        return self.grouping.assign(
            [part.param_name for part in parts], [part.stepped for part in parts]
        )

    def needs(self, params: Sequence[Tensor]) -> Mapping[str, int]:
        if self.grouping is None:
            return {}
        return self.grouping.needs([self._stepped[id(param)] for param in params])

    def cuts(self, names: Sequence[str]) -> Sequence[bool]:
        # what is stepped may be flat, so that its first dimension is none of the parameter's
        return [False] * len(names)

    def rules(self) -> Mapping[str, Any]:
        return {} if self.grouping is None else self.grouping.rules()

    def patterns(self) -> Sequence[str]:
        return () if self.grouping is None else self.grouping.patterns()

    def __repr__(self) -> str:
        return "Megatron's groups of norms" if self.grouping is None else repr(self.grouping)


class _AttachedOptimizer:
    """One attached optimizer."""

    clipper: GradClipper

    def __init__(
        self, optimizer: Any, subs: Sequence[Any], parts: list[_SteppedPart], by_norm_group: bool
    ) -> None:
        self.optimizer, self.subs, self.parts = optimizer, subs, parts
        self._by_norm_group = by_norm_group
        self._of = {id(part.stand_in): part for part in parts}
        self._measures = False
        self._own_clip_grad = [sub.config.clip_grad for sub in subs]

    def install(self) -> None:
        for sub in self.subs:
            sub.config.clip_grad = 0.0
        attached = self

        def step(_: Any) -> tuple[bool, float | None, float | None]:
            return attached.step()

        self.optimizer.step = MethodType(step, self.optimizer)
        self.optimizer._distclip = self

    def remove(self) -> None:
        for sub, clip_grad in zip(self.subs, self._own_clip_grad, strict=True):
            sub.config.clip_grad = clip_grad
        del self.optimizer.step, self.optimizer._distclip

    def grad_of(self, stand_in: Tensor) -> Tensor | None:
        part = self._of[id(stand_in)]
        # a second copy has the gradient of the first: it is scaled, and counts nothing
        return None if self._measures and not part.counts else part.stepped.grad

    @torch.no_grad()
    def step(self) -> tuple[bool, float | None, float | None]:
        """What Megatron's optimizers do in `step`, with distclip's decision in the middle."""
        for sub in self.subs:
            if type(sub) is FP32Optimizer:
                sub.prepare_grads()  # points to main_grad, nothing more
            elif not sub.is_stub_optimizer:
                sub._copy_model_grads_to_main_grads()
        scalers = [s for sub in self.subs if (s := getattr(sub, "grad_scaler", None)) is not None]
        scale = float(scalers[0].scale) if scalers else 1.0
        self._measures = True
        try:
            report = self.clipper.decide(
                1 / scale, dynamic_loss_scale=any(map(_has_dynamic_scale, self.subs))
            )
        finally:
            self._measures = False
        report = report.on_host()
        skipped, total = bool(report.skipped), float(report.total_norm)
        overflow = skipped and (bool(int(report.nonfinite)) or not math.isfinite(total))
        for scaler in scalers:
            scaler.update(overflow)
        if overflow:
            return False, None, None
        norm = self._publish_norms(report)
        if skipped:
            return False, norm, None
        self.clipper.apply_([part.stand_in for part in self.parts])
        config = self.subs[0].config if self.subs else None
        zeros = (
            self.optimizer.count_zeros()
            if config is not None and config.log_num_zeros_in_grad
            else None
        )
        return bool(self.optimizer.step_with_ready_grads()), norm, zeros

    def _publish_norms(self, report: ClipReport) -> float:
        """The norm that `step` returns; those of other groups lie where Megatron's log looks for
        them."""
        norms = dict(zip(report.groups, report.group_norms.tolist(), strict=True))
        if not self._by_norm_group or _MAIN_NORM not in norms:
            return float(report.total_norm)
        main = norms.pop(_MAIN_NORM)
        self.optimizer.grad_norms_by_group = norms
        return main
