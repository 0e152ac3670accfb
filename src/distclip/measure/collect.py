"""Parameters → this rank's gradient tensors, each compared with the plan. What is wrong
becomes a text, never an early exit.

A step compares its gradients with those that were found right before (`gradient_cache`), all at
once. Where anything differs, parameters are looked at one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from operator import attrgetter, is_, is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distclip.exchange.message import MessageLayout
from distclip.kernels.tensor_list import PLAIN, TensorList
from distclip.measure.grad_placements import (
    kind_error,
    placed_otherwise,
    portion_of,
    redistribute_advice,
)
from distclip.measure.gradient_cache import GradientCache
from distclip.records import ParamPiece
from distclip.setup.parameters import ModuleEntry
from distclip.setup.placement import DEVICES
from distclip.setup.plan import Plan
from distclip.setup.steps_in_backward import StepsSinceSetup
from distclip.torch_internals.dtensor import local_tensor
from distclip.torch_internals.hooks import accumulate_hooks, optimizers_in_backward

GradOf = Callable[[Tensor], "Tensor | None"]
own_grad: GradOf = attrgetter("grad")
_REMEMBERED = 8  # sets of gradients that are there: experts come and go


class GradientSet:
    """Which pieces have a gradient, and what follows from that alone: made once for as long as they
    are the same, and asked for again by `is`.

    Attributes:
        unique: pieces that have a gradient of their own: those of a TensorList, in its order.
        indices: pieces that have one, shared with another piece or not.
        index: `unique` as int64 on the compute device, or None where these are all pieces.
        mask: [pieces] float64 on the compute device, 1 where there is a gradient.
        presence: what the message says of it.
        misplaced: pieces whose gradients are placed otherwise than their parameters.
        portions: of `unique`, what such gradients count; () where all count 1. `portion`: the same
            on the compute device, float64.
        groups: of `unique`, their groups; `group_index`: the same, int64 on the compute device.
        totals: of `unique`, the layout's.
    """

    __slots__ = (
        "_zeros", "group_index", "groups", "index", "indices", "mask", "misplaced", "portion",
        "portions", "presence", "selections", "skip_masks", "totals", "unique",
    )  # fmt: skip

    def __init__(
        self,
        layout: MessageLayout,
        group_of: Sequence[int],
        unique: Sequence[int] = (),
        indices: Sequence[int] = (),
        misplaced: frozenset[int] = frozenset(),
        portions: tuple[float, ...] = (),
    ) -> None:
        device, count = layout.share.device, len(layout.share)
        mask = torch.zeros(count, dtype=torch.float64, device="cpu")
        mask[list(indices)] = 1
        whole = len(unique) == count
        self.unique, self.indices = tuple(unique), tuple(indices)
        self.index = None if whole else _to_device(self.unique, torch.int64, device)
        self.mask = mask.to(device)
        self._zeros, self.totals = torch.zeros_like(self.mask), layout.totals
        if self.index is not None and self.totals is not None:
            self.totals = self.totals.select(self.index)
        self.presence = layout.presence_words(self.mask)
        self.misplaced, self.portions = misplaced, portions
        self.portion = _to_device(portions, torch.float64, device) if portions else None
        self.groups = [group_of[i] for i in self.unique]
        all_groups = layout.group_of
        self.group_index = all_groups if self.index is None else all_groups[self.index]
        self.selections: dict[tuple[int, ...], PolicySelection] = {}
        self.skip_masks: dict[frozenset[int], Tensor] = {}

    def in_places(self, values: Tensor) -> Tensor:
        """[unique] float64, each in its piece's place: [pieces], 0 elsewhere."""
        return values if self.index is None else self._zeros.index_copy(0, self.index, values)

    def key(self) -> tuple[object, ...]:
        """Equal for equal ones."""
        return self.unique, self.indices, self.misplaced, self.portions

    def select(
        self, groups: tuple[int, ...], num_replicas: Sequence[int], device: torch.device
    ) -> PolicySelection:
        """The gradients of one policy's groups."""
        if groups not in self.selections:
            place = {group: i for i, group in enumerate(groups)}
            mine = [n for n, group in enumerate(self.groups) if group in place]
            portions = self.portions or [1.0] * len(self.unique)
            self.selections[groups] = PolicySelection(
                positions=mine,
                at=_to_device(mine, torch.int64, device),
                group=_to_device([place[self.groups[n]] for n in mine], torch.int64, device),
                share=_to_device(
                    [portions[n] / num_replicas[self.unique[n]] for n in mine],
                    torch.float64,
                    device,
                ),
            )
        return self.selections[groups]

    def mask_of(self, pieces: frozenset[int], device: torch.device) -> Tensor:
        """[unique] bool: which gradients are of these pieces."""
        if pieces not in self.skip_masks:
            self.skip_masks.clear()
            self.skip_masks[pieces] = _to_device(
                [i in pieces for i in self.unique], torch.bool, device
            )
        return self.skip_masks[pieces]


class PolicySelection(NamedTuple):
    """Those of a set's gradients that one policy governs; tensors on the compute device."""

    positions: list[int]  # in the TensorList
    at: Tensor  # the same, int64
    group: Tensor  # int64: which of the policy's groups
    share: Tensor  # float64: what each counts here


def _to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu").to(device)


class GradientCollector:
    """Fetches gradients and compares them with the plan. Never communicates.

    Args:
        members: [pieces] the parameters.
        grad_of: where a parameter's gradient is; None for `.grad`.
        layout: of the message, on the compute device.
        modules: that were passed; none where pairs or parameters were.
    """

    def __init__(
        self,
        members: Sequence[Tensor],
        plan: Plan,
        entries: Sequence[ModuleEntry],
        grad_of: GradOf | None,
        layout: MessageLayout,
        modules: Sequence[nn.Module],
    ) -> None:
        self.members, self.pieces, self.entries = members, plan.pieces, entries
        self.grad_of = grad_of or own_grad
        self.device = layout.share.device
        self._layout, self._group_of = layout, plan.group_of
        self._tables = [entry.table for entry in entries]
        self._keys = [entry.key for entry in entries]
        self._held = [entry.value for entry in entries]
        # what an optimizer stepped inside backward() at set-up already, which was told there
        self._told = [bool(optimizers_in_backward(member)) for member in members]
        self._steps = StepsSinceSetup(modules, members, plan.pieces)
        # by which gradients are there
        self._caches: dict[bytes, tuple[GradientSet, GradientCache]] = {}
        self._every = bytes([1] * len(members))  # the key where all are there
        self._latest: GradientSet | None = None

    def collect(self) -> tuple[GradientSet, TensorList, list[str]]:
        """Which gradients are there, this rank's tensors of the set's `unique` pieces, and what is
        wrong. A gradient that two parameters share is taken once."""
        grads = list(map(self.grad_of, self.members))
        stay = all(map(is_, map(dict.get, self._tables, self._keys), self._held))
        # most often all are there, which shows in what is compared
        known = self._caches.get(self._every) if stay else None
        listed = None if known is None else known[1].match_grads(grads)
        if known is not None and listed is not None:
            return known[0], listed, []
        has = bytes(map(is_not, grads, repeat(None)))
        known = self._caches.get(has) if stay and 0 in has else None
        if known is not None:
            listed = known[1].match_grads([grad for grad in grads if grad is not None])
            if listed is not None:
                return known[0], listed, []
        return self._collect_checked(grads, has)

    def collect_subset(self, mine: Sequence[int]) -> tuple[GradientSet, TensorList]:
        """Of these pieces alone, as they are now; one that two share is taken once."""
        found = [
            (i, local_tensor(grad))
            for i in mine
            if (grad := self.grad_of(self.members[i])) is not None
        ]
        own = list({_storage_key(grad): i for i, grad in reversed(found)}.values())[::-1]
        local = {i: grad for i, grad in found}
        grad_set = GradientSet(self._layout, self._group_of, own, [i for i, _ in found])
        return grad_set, TensorList.of([local[i] for i in own])

    def all_parameters(self) -> GradientSet:
        """As if every parameter were a gradient."""
        every = range(len(self.members))
        return GradientSet(self._layout, self._group_of, every, every)

    def _collect_checked(
        self, grads: Sequence[Tensor | None], has: bytes
    ) -> tuple[GradientSet, TensorList, list[str]]:
        own: list[int] = []
        every: list[int] = []
        local: list[Tensor] = []
        errors: list[str] = []
        portions: list[float] = []
        unfit: list[tuple[str, Tensor]] = []
        misplaced: set[int] = set()
        seen: set[tuple[int, ...]] = set()
        for i, (grad, piece) in enumerate(zip(grads, self.pieces, strict=True)):
            if grad is None:
                continue
            every.append(i)
            error = kind_error(grad, self.members[i], piece)
            elsewhere = placed_otherwise(grad, piece)
            portion = portion_of(grad, piece) if elsewhere and error is None else 1.0
            if isinstance(portion, str):
                unfit.append((portion, grad))
                continue
            if elsewhere:
                misplaced.add(i)
            tensor = local_tensor(grad)
            memory = _storage_key(tensor)
            if memory in seen:
                continue
            seen.add(memory)
            if error is None and tensor.device.type not in DEVICES:
                error = (
                    f"the gradient of {piece.name} is on the device {tensor.device}; distclip "
                    f"clips on the CPU and on CUDA. Move the "
                    "parameter there and call clipper.rebuild()"
                )
            elif error is None and tuple(tensor.shape) != piece.local_shape and i not in misplaced:
                error = (
                    f"the gradient of {piece.name} has local shape {tuple(tensor.shape)}, the plan "
                    f"says {piece.local_shape} "
                    f"({piece.holding.description}); it is not sharded or reduced yet (no_sync?): "
                    f"clip "
                    f"after the reduction, or call "
                    "clipper.rebuild() if the parameter was changed"
                )
            if error is None:
                own.append(i)
                local.append(tensor)
                portions.append(portion)
            else:
                errors.append(error)
        if unfit:
            texts, wrong = zip(*unfit, strict=True)
            errors.append(
                texts[0] + redistribute_advice(wrong, elsewhere=self.grad_of is not own_grad)
            )
        if not every and (hooks := _hooks(self.members, self.pieces, self._told)):
            errors.append(
                f"no parameter has a gradient, and {hooks} runs as soon as a gradient is "
                f"accumulated: an optimizer that steps inside "
                "backward leaves nothing to clip, and the global norm is not known yet there; step "
                "after the clip, without this hook"
            )
        if self.grad_of is not own_grad and local and (error := self._returns_new_tensor(every[0])):
            errors.append(error)
        errors += self._steps.errors(has)
        replaced = [entry.path for entry in self.entries if entry.is_replaced()]
        if replaced:
            errors.append(
                f"{replaced[0]} was replaced after the clipper was built ({len(replaced)} in all); "
                f"call clipper.rebuild() on all ranks"
            )
        parts = tuple(portions) if set(portions) - {1.0} else ()
        key = (tuple(own), tuple(every), frozenset(misplaced), parts)
        # making one sends its tensors to the device
        if self._latest is None or self._latest.key() != key:
            self._latest = GradientSet(self._layout, self._group_of, *key)
        listed = TensorList.of(local)
        if len(self._caches) >= _REMEMBERED:
            self._caches.clear()
        self._caches.pop(has, None)
        if not errors and len(own) == len(every):
            given = [grad for grad in grads if grad is not None]
            cache = GradientCache.from_grads(given, listed, self.device)
            if cache is not None:
                self._caches[has] = self._latest, cache
        return self._latest, listed, errors

    def _returns_new_tensor(self, i: int) -> str | None:
        """What is wrong with a `grad_of` that makes a new tensor at each call."""
        first, second = self.grad_of(self.members[i]), self.grad_of(self.members[i])
        if (
            first is None
            or second is None
            or _storage_key(local_tensor(first)) == _storage_key(local_tensor(second))
        ):
            return None
        return (
            f"grad_of makes a new tensor for {self.pieces[i].name} at each call, so that clipping "
            f"it changes nothing; return the tensor "
            "that the optimizer reads"
        )


def _storage_key(tensor: Tensor) -> tuple[int, ...]:
    """Equal for two gradients that are the same, be they one object or two over the same memory."""
    if type(tensor) not in PLAIN or tensor.layout is not torch.strided or not tensor.numel():
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.numel())


def _hooks(params: Sequence[Tensor], pieces: Sequence[ParamPiece], told: Sequence[bool]) -> str:
    """The first hook of `register_post_accumulate_grad_hook`, or optimizer that steps in such a
    place and was not told of, and of how many parameters."""
    hooked = [
        (piece.name, found)
        for param, piece, is_told in zip(params, pieces, told, strict=True)
        if (found := accumulate_hooks(param) or ([] if is_told else optimizers_in_backward(param)))
    ]
    if not hooked:
        return ""
    name, (hook, *_) = hooked[0]
    return (
        f"the hook {getattr(hook, '__qualname__', type(hook).__qualname__)} of {name} "
        f"({len(hooked)} parameters have such hooks)"
    )
