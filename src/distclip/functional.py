"""Drop-ins with torch.nn.utils' signatures: on plain tensors they send nothing; on DTensors they
give the global norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import attrgetter
from types import GeneratorType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_ as torchs_clip_grad_norm_
from torch.nn.utils import clip_grad_value_ as torchs_clip_grad_value_
from torch.nn.utils import clip_grads_with_norm_ as torchs_clip_grads_with_norm_
from torch.nn.utils import get_total_norm as torchs_get_total_norm

from distclip.errors import ConfigError, PlacementError
from distclip.kernels.tensor_list import TensorList
from distclip.p_norm import norm_of
from distclip.setup.placement import DEVICES
from distclip.torch_internals.dtensor import dtensor_class, is_dtensor, local_tensor
from distclip.torch_internals.fsdp1 import is_flattened

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# torch's functions are bound above and not looked up: a call of `torch.nn.utils.x` would come back
# here where distclip's stand in its place
TensorOrTensors: TypeAlias = "Tensor | Iterable[Tensor]"


def clip_grad_norm_(
    parameters: TensorOrTensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, right in low precision and on any mixture of DTensors.

    Plain tensors: nothing is sent; float16 and bfloat16 gradients give a float32 norm. DTensors:
    one functional all-reduce for each dimension of the meshes given. The coefficient is torch's:
    max_norm / (total_norm + 1e-6), at most 1.

    Returns:
        The norm before clipping: a Replicate DTensor if all gradients are DTensors of one mesh,
            else a 0-dim tensor.

    Raises:
        ConfigError (a ValueError): `max_norm` is negative or NaN; `norm_type` is 0, negative or NaN
            and there are DTensors (on plain tensors alone such orders are left to torch).
        PlacementError: an FSDP1 shard, whose norm this function cannot know; or a Partial gradient.
        RuntimeError: torch's, for a norm that is not finite, with `error_if_nonfinite`.
    """
    params = _listed(parameters)
    if not params and isinstance(parameters, GeneratorType):
        return torchs_clip_grad_norm_((p for p in params), max_norm)  # torch's own warning
    max_norm = float(max_norm)
    if math.isnan(max_norm) or max_norm < 0:
        raise ConfigError(
            f"max_norm={max_norm!r} is not a threshold: a negative one would turn "
            f"gradients around; pass 0 or more"
        )
    for i, param in enumerate(params):
        if is_flattened(param):
            raise PlacementError(
                f"parameter {i} is a shard of an FSDP1 module: its norm on this rank is not the "
                f"global one. Use "
                "distclip.GradClipper(model, max_norm=...) on the outermost "
                "FullyShardedDataParallel module, or its own clip_grad_norm_"
            )
    grads = _distinct([p.grad for p in params if p.grad is not None])
    total = _total_norm(grads, float(norm_type), error_if_nonfinite, foreach)
    _scale_(params, grads, max_norm, total, foreach)
    return total


def get_total_norm(
    tensors: TensorOrTensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """The p-norm of all tensors as if they were one vector; a tensor listed twice counts once. See
    `clip_grad_norm_`."""
    return _total_norm(_distinct(_listed(tensors)), float(norm_type), error_if_nonfinite, foreach)


def _total_norm(
    given: list[Tensor], p: float, error_if_nonfinite: bool, foreach: bool | None
) -> Tensor:
    if not given:
        return torch.tensor(0.0)
    sharded = (
        [t for t in given if is_dtensor(t)] if dtensor_class() in set(map(type, given)) else []
    )
    known = 0 < p <= math.inf
    if not _here(given) or not (known or sharded):
        return torchs_get_total_norm(given, p, error_if_nonfinite, foreach)
    if not known:
        raise ConfigError(
            f"norm_type={p}: on DTensors the order of a norm must be positive, or math.inf; others "
            f"are known on plain tensors alone "
            "(gather these by full_tensor())"
        )
    norm = _global_norm(sharded, [t for t in given if not is_dtensor(t)] if sharded else given, p)
    if error_if_nonfinite and not _whole(norm).isfinite():
        # raises, in torch's words
        torchs_get_total_norm([_whole(norm)], p, error_if_nonfinite=True)
    return norm


def clip_grads_with_norm_(
    parameters: TensorOrTensors, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Scale gradients in place by min(1, max_norm / (total_norm + 1e-6)), at float32 precision or
    better. Sends nothing."""
    params = _listed(parameters)
    _scale_(
        params,
        _distinct([p.grad for p in params if p.grad is not None]),
        float(max_norm),
        total_norm,
        foreach,
    )


def _scale_(
    params: list[Tensor],
    grads: list[Tensor],
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None,
) -> None:
    if not grads:
        return
    if not _here(grads):
        torchs_clip_grads_with_norm_(params, max_norm, total_norm, foreach)
        return
    coef = (max_norm / (_whole(total_norm).double() + 1e-6)).clamp(max=1.0)
    on_host = coef.device.type == "cpu"
    if on_host and coef == 1:
        return
    with torch.no_grad():
        TensorList.of(_local(grads)).scale_(float(coef) if on_host else coef.expand(len(grads)))


def clip_grad_value_(
    parameters: TensorOrTensors, clip_value: float, foreach: bool | None = None
) -> None:
    """Clamp gradients to [-clip_value, clip_value] in place; shards are clamped where they are.
    Sends nothing."""
    params = _listed(parameters)
    grads = _distinct([p.grad for p in params if p.grad is not None])
    value = float(clip_value)
    if math.isnan(value) or value < 0:
        raise ConfigError(f"clip_value={clip_value!r} is not a bound; pass 0 or more")
    if not _here(grads):
        torchs_clip_grad_value_(params, clip_value, foreach)
        return
    if not grads:
        return
    with torch.no_grad():
        TensorList.of(_local(grads)).clamp_(
            torch.full((len(grads),), value, dtype=torch.float64, device=grads[0].device)
        )


def _listed(tensors: TensorOrTensors) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def _here(tensors: Sequence[Tensor]) -> bool:
    """Whether all are on devices that distclip computes on; else torch's own functions serve."""
    # a device is made anew at each look, which takes twenty times as long as the flag
    return all(map(attrgetter("is_cpu"), tensors)) or all(
        device.type in DEVICES for device in set(map(attrgetter("device"), tensors))
    )


def _local(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return (
        tensors
        if set(map(type, tensors)) == {Tensor}
        else [local_tensor(tensor) for tensor in tensors]
    )


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if is_dtensor(norm) else norm


@torch.no_grad()
def _global_norm(sharded: list[DTensor], plain: list[Tensor], p: float) -> Tensor:
    meshes: dict[Any, list[DTensor]] = {}
    for tensor in sharded:
        if any(placement.is_partial() for placement in tensor.placements):
            raise PlacementError(
                f"a gradient of shape {tuple(tensor.shape)} has placements {tensor.placements}: "
                f"Partial sums that are not reduced yet; "
                "before clipping: p.grad = p.grad.redistribute(placements=p.placements)"
            )
        meshes.setdefault(tensor.device_mesh, []).append(tensor)
    device = (sharded or plain)[0].device
    dtype = torch.float32
    for own in {tensor.dtype for tensor in (*sharded, *plain)}:
        dtype = torch.promote_types(dtype, own.to_real())
    parts = [_over_mesh(mesh, tensors, p).to(device) for mesh, tensors in meshes.items()]
    if plain:
        parts.append(_combined(TensorList.of(plain).power_sums(p), p).to(device))
    norm = norm_of(_combined(torch.stack(parts), p), p).to(dtype)
    if len(meshes) == 1 and not plain:
        from torch.distributed.tensor import DTensor, Replicate

        mesh = next(iter(meshes))
        return DTensor.from_local(norm, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return norm


def _combined(sums: Tensor, p: float) -> Tensor:
    return sums.max() if math.isinf(p) else sums.sum()


def _over_mesh(mesh: Any, tensors: list[DTensor], p: float) -> Tensor:
    """The power sum (maximum) over one mesh: 0-dim float64. One functional all-reduce for each of
    its dimensions."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    sums = TensorList.of(_local(tensors)).power_sums(p)
    if math.isinf(p):
        # MAX over ranks can lose a NaN, so it travels as a flag beside the maximum
        packed, op = (
            torch.stack(
                [sums.nan_to_num(nan=math.inf, posinf=math.inf).max(), sums.isnan().any().double()]
            ),
            "max",
        )
    else:
        placements = [tensor.placements for tensor in tensors]
        sizes = mesh.shape  # worked out anew at each look
        held = {
            each: math.prod(n for n, q in zip(sizes, each) if q.is_replicate())
            for each in set(placements)
        }
        copies = [held[each] for each in placements]
        packed, op = (
            (sums / torch.tensor(copies, dtype=torch.float64, device=sums.device)).sum().reshape(1),
            "sum",
        )
    partial = DTensor.from_local(
        packed.to(mesh.device_type), mesh, [Partial(op)] * mesh.ndim, run_check=False
    )
    reduced = local_tensor(partial.redistribute(placements=[Replicate()] * mesh.ndim))
    if math.isinf(p):
        return torch.where(reduced[1] > 0, math.nan, reduced[0])
    return reduced[0]
