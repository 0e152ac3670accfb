"""Drop-ins with torch.nn.utils' signatures: on plain tensors they send nothing; on DTensors they
give the global norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from operator import attrgetter
from types import GeneratorType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_ as torchs_clip_grad_norm_
from torch.nn.utils import clip_grad_value_ as torchs_clip_grad_value_
from torch.nn.utils import clip_grads_with_norm_ as torchs_clip_grads_with_norm_
from torch.nn.utils import get_total_norm as torchs_get_total_norm

from distclip.errors import ConfigError, PlacementError
from distclip.kernels.tensor_list import TensorList
from distclip.p_norm import norm_of, p_norm
from distclip.passed import as_list
from distclip.setup.placement import DEVICES
from distclip.torch_internals.compile import without_grad
from distclip.torch_internals.dtensor import dtensor_class, is_dtensor, local_tensor
from distclip.torch_internals.fsdp1 import first_flattened

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# torch's functions are bound above and not looked up: a call of `torch.nn.utils.x` would come back
# here where distclip's stand in its place
TensorOrTensors: TypeAlias = "Tensor | Iterable[Tensor]"
_GRAD = attrgetter("grad")


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
        The norm before clipping, a Replicate DTensor if all gradients are DTensors of one mesh,
        else a 0-dim tensor.

    Raises:
        ConfigError (a ValueError): `max_norm` is negative or NaN; `norm_type` is 0, negative or NaN
            and there are DTensors (on plain tensors alone such orders are left to torch); an
            argument of a wrong type.
        PlacementError: an FSDP1 shard, whose norm this function cannot know; or a Partial gradient.
        RuntimeError: torch's, for a norm that is not finite, with `error_if_nonfinite`.
    """
    params = _listed("parameters", parameters)
    max_norm, norm_type = _threshold(max_norm), _number("norm_type", norm_type)
    if not params and isinstance(parameters, GeneratorType):
        return torchs_clip_grad_norm_((p for p in params), max_norm)  # torch's own warning
    if (i := first_flattened(params)) is not None:
        raise PlacementError(
            f"parameter {i} is a shard of an FSDP1 module: its norm on this rank is not the "
            f"global one. Use "
            "distclip.GradClipper(model, max_norm=...) on the outermost "
            "FullyShardedDataParallel module, or its own clip_grad_norm_"
        )
    grads = _grads_of(params)
    total = _total_norm(grads, norm_type, error_if_nonfinite, foreach)
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
    given = _GivenTensors(_listed("tensors", tensors))
    return _total_norm(given, _number("norm_type", norm_type), error_if_nonfinite, foreach)


def _total_norm(
    given: _GivenTensors, p: float, error_if_nonfinite: bool, foreach: bool | None
) -> Tensor:
    if not given.distinct:
        return torch.tensor(0.0)
    known = 0 < p <= math.inf
    if not given.on_known_devices or not (known or given.has_dtensors):
        return torchs_get_total_norm(given.distinct, p, error_if_nonfinite, foreach)
    if not known:
        raise ConfigError(
            f"norm_type={p}: on DTensors the order of a norm must be positive, or math.inf; others "
            f"are known on plain tensors alone "
            "(gather these by full_tensor())"
        )
    norm = _norm_over_meshes(given.distinct, p) if given.has_dtensors else _norm_here(given, p)
    if error_if_nonfinite and not _whole(norm).isfinite():
        # raises, in torch's words
        torchs_get_total_norm([_whole(norm)], p, error_if_nonfinite=True)
    return norm


def clip_grads_with_norm_(
    parameters: TensorOrTensors, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Scale gradients in place by min(1, max_norm / (total_norm + 1e-6)), at float32 precision or
    better. Sends nothing.

    Raises:
        ConfigError (a ValueError): `max_norm` is negative or NaN, or an argument of a wrong type.
    """
    params = _listed("parameters", parameters)
    max_norm = _threshold(max_norm)
    if not isinstance(total_norm, Tensor):
        raise ConfigError(
            f"total_norm is a {type(total_norm).__name__}; pass the tensor that get_total_norm gave"
        )
    if total_norm.numel() != 1 or total_norm.is_complex():
        raise ConfigError(
            f"total_norm={total_norm} is not one real number; pass what get_total_norm gave"
        )
    _scale_(params, _grads_of(params), max_norm, total_norm, foreach)


def _scale_(
    params: list[Tensor],
    grads: _GivenTensors,
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None,
) -> None:
    if not grads.distinct:
        return
    if not grads.on_known_devices:
        torchs_clip_grads_with_norm_(params, max_norm, total_norm, foreach)
        return
    norm = _whole(total_norm)
    if norm.is_meta:
        raise ConfigError("total_norm is on the device meta, and the gradients are not")
    if norm.device.type == "cpu":
        coef = max_norm / (float(norm) + 1e-6)
        if coef < 1 or math.isnan(coef):
            grads.local.scale_(coef)
        return
    on_device = (max_norm / (norm.double() + 1e-6)).clamp(max=1.0)
    grads.local.scale_(on_device.expand(len(grads.distinct)))


def clip_grad_value_(
    parameters: TensorOrTensors, clip_value: float, foreach: bool | None = None
) -> None:
    """Clamp gradients to [-clip_value, clip_value] in place; shards are clamped where they are.
    Sends nothing.

    Raises:
        ConfigError (a ValueError): `clip_value` is negative or NaN, or an argument of a wrong type.
    """
    params = _listed("parameters", parameters)
    grads = _grads_of(params)
    value = _number("clip_value", clip_value)
    if math.isnan(value) or value < 0:
        raise ConfigError(f"clip_value={clip_value!r} is not a bound; pass 0 or more")
    if not grads.on_known_devices:
        torchs_clip_grad_value_(params, clip_value, foreach)
    elif count := len(grads.distinct):
        device = grads.distinct[0].device
        grads.local.clamp_(torch.full((count,), value, dtype=torch.float64, device=device))


def _listed(name: str, tensors: TensorOrTensors) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    listed = None if isinstance(tensors, nn.Module) else as_list(tensors)
    if listed is None:
        raise ConfigError(f"{name} is a {type(tensors).__name__}{_INSTEAD[name]}")
    for kind in set(map(type, listed)):
        if not issubclass(kind, Tensor):
            at = next(i for i, tensor in enumerate(listed) if type(tensor) is kind)
            raise ConfigError(f"{name}[{at}] is a {kind.__name__}{_INSTEAD[name]}")
    return listed


_INSTEAD = {
    "parameters": "; pass parameters: clip_grad_norm_(model.parameters(), max_norm)",
    "tensors": "; pass tensors: get_total_norm([p.grad for p in params if p.grad is not None])",
}


def _number(name: str, value: Any) -> float:
    """As torch's functions have it, which read texts too."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ConfigError(f"{name}={value!r} is not a number") from error


def _threshold(max_norm: Any) -> float:
    value = _number("max_norm", max_norm)
    if math.isnan(value) or value < 0:
        raise ConfigError(
            f"max_norm={value!r} is not a threshold: a negative one would turn "
            f"gradients around; pass 0 or more"
        )
    return value


class _GivenTensors:
    """Tensors of one call, each looked at once; one that is listed twice counts once."""

    def __init__(self, tensors: list[Tensor]) -> None:
        if len(set(map(id, tensors))) < len(tensors):
            tensors = list({id(tensor): tensor for tensor in tensors}.values())
        self.distinct = tensors
        self._kinds = set(map(type, tensors))
        self.has_dtensors = dtensor_class() in self._kinds

    @cached_property
    def on_cpu(self) -> bool:
        # a device is made anew at each look, which takes twenty times as long as the flag
        return all(map(attrgetter("is_cpu"), self.distinct))

    @cached_property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(map(attrgetter("dtype"), self.distinct))

    @cached_property
    def on_known_devices(self) -> bool:
        """Whether all are on devices that distclip computes on; else torch's own functions
        serve."""
        if self.on_cpu:
            return True
        devices = set(map(attrgetter("device"), self.distinct))
        return all(device.type in DEVICES for device in devices)

    @cached_property
    def local(self) -> TensorList:
        """This rank's parts."""
        return _local_list(self)

    @property
    def are_plain(self) -> bool:
        """All are tensors of torch's own type: their own local parts."""
        return self._kinds == {Tensor}


def _grads_of(params: list[Tensor]) -> _GivenTensors:
    return _GivenTensors([grad for grad in map(_GRAD, params) if grad is not None])


@without_grad
def _local_list(given: _GivenTensors) -> TensorList:
    tensors = given.distinct
    if given.are_plain:
        return TensorList.of(tensors, given.dtypes, given.on_cpu)
    return TensorList.of(list(map(local_tensor, tensors)))


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if is_dtensor(norm) else norm


@without_grad
def _norm_here(given: _GivenTensors, p: float) -> Tensor:
    """Of plain tensors: 0-dim, of the dtype in which torch would give it, float32 at least."""
    norm = norm_of(p_norm(p).combine(given.local.power_sums(p)), p)
    return norm.to(_norm_dtype(given.dtypes))


@without_grad
def _norm_over_meshes(given: list[Tensor], p: float) -> Tensor:
    """Of DTensors and, counted once, plain tensors beside them."""
    meshes: dict[Any, list[DTensor]] = {}
    plain: list[Tensor] = []
    for tensor in given:
        if not is_dtensor(tensor):
            plain.append(tensor)
            continue
        if any(placement.is_partial() for placement in tensor.placements):
            raise PlacementError(
                f"a gradient of shape {tuple(tensor.shape)} has placements {tensor.placements}: "
                "Partial sums that are not reduced yet; before clipping: p.grad = "
                "p.grad.redistribute(placements=p.placements)"
            )
        meshes.setdefault(tensor.device_mesh, []).append(tensor)
    device = next(iter(meshes.values()))[0].device
    parts = [_over_mesh(mesh, tensors, p).to(device) for mesh, tensors in meshes.items()]
    if plain:
        parts.append(p_norm(p).combine(TensorList.of(plain).power_sums(p)).to(device))
    norm = norm_of(p_norm(p).combine(torch.stack(parts)), p).to(
        _norm_dtype([tensor.dtype for tensor in given])
    )
    if len(meshes) == 1 and not plain:
        from torch.distributed.tensor import DTensor, Replicate

        mesh = next(iter(meshes))
        return DTensor.from_local(norm, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return norm


def _norm_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    dtype = torch.float32
    for own in set(dtypes):
        dtype = torch.promote_types(dtype, own.to_real())
    return dtype


def _over_mesh(mesh: Any, tensors: list[DTensor], p: float) -> Tensor:
    """The power sum (maximum) over one mesh: 0-dim float64. One functional all-reduce for each of
    its dimensions."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    sums = TensorList.of([local_tensor(tensor) for tensor in tensors]).power_sums(p)
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
