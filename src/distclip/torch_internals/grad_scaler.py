"""GradScaler's records of each optimizer: read and written in this file alone.

A scaler knows for each optimizer whether its gradients were unscaled and whether one was not
finite. Both are replaced here: the inverse scale becomes a factor of the clip's own multiply, and
the scaler's record is set to the overflow that all ranks agreed on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from distclip.errors import ConfigError
from distclip.values import Flag, Number

# Their step forwards to the optimizer in `.optimizer` and does nothing else to parameters. They are
# known by name, since the frameworks need not be installed.
_FORWARDING = {
    ("accelerate.optimizer", "AcceleratedOptimizer"),
    ("lightning.pytorch.core.optimizer", "LightningOptimizer"),
    ("pytorch_lightning.core.optimizer", "LightningOptimizer"),
    ("lightning.fabric.wrappers", "_FabricOptimizer"),
    ("lightning_fabric.wrappers", "_FabricOptimizer"),
}
_NAME_OF = attrgetter("__module__", "__qualname__")
# what each of torch's optimizers keeps: of parameters, and no optimizers
_OWN = ("state", "param_groups", "defaults")


def unwrap_optimizer(optimizer: Any) -> list[Any]:
    """`optimizer`, and what it wraps, for as long as that is a framework's wrapper that only
    forwards; the last one is to be stepped.

    Any other wrapper is the last one itself: what it does besides forwarding must happen, and a
    scaler keeps its records under it.
    """
    links = [optimizer]
    while _forwards(type(links[-1])):
        links.append(links[-1].optimizer)
    return links


def _forwards(kind: type) -> bool:
    return not _FORWARDING.isdisjoint(map(_NAME_OF, kind.__mro__))


def inner_optimizers(optimizer: Any) -> list[Any]:
    """Optimizers that a wrapper or a container of several keeps, under whatever names, at any
    depth."""
    found: dict[int, Any] = {id(optimizer): optimizer}
    holders = [optimizer]
    for holder in holders:
        for item in _attributes_of(holder):
            if (
                id(item) not in found
                and hasattr(item, "param_groups")
                and callable(getattr(item, "step", None))
            ):
                found[id(item)] = item
                holders.append(item)
    return list(found.values())[1:]


def _attributes_of(holder: Any) -> Iterator[Any]:
    """What an object keeps in its attributes, in lists and dicts too. No property is read: it may
    compute, or raise."""
    if type(holder).__module__.partition(".")[0] == "torch":
        return
    attributes = dict(vars(holder)) if hasattr(holder, "__dict__") else {}
    for slot in (
        slot
        for kind in type(holder).__mro__
        for slot in _slot_names(getattr(kind, "__slots__", ()))
    ):
        attributes[slot] = getattr(holder, slot, None)
    for value in (value for name, value in attributes.items() if name not in _OWN):
        items: list[Any] = (
            list(value.values())
            if isinstance(value, dict)
            else list(value)
            if isinstance(value, (list, tuple))
            else [value]
        )
        if items and not isinstance(items[0], Tensor):
            yield from items


def _slot_names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


class ScalerState:
    """The scaler's part in one call; with no scaler, nothing.

    Args:
        scaler: a `torch.amp.GradScaler` or `ShardedGradScaler`; None or a disabled one has no
            effect.
        optimizers: as they were given, perhaps wrapped.
        device: where gradients are measured.
        on_host: the scale's inverse is read at once.

    Attributes:
        enabled: False without an enabled scaler.
        is_scaled: [optimizers] whose gradients still carry the scale.
        inv_scale: float, or [] float64 on the device; None without an enabled scaler.

    Raises:
        ConfigError: the scaler is of another kind, has scaled no loss yet, or has stepped an
            optimizer since its update; it has unscaled an optimizer inside a wrapper, and not the
            wrapper.
    """

    def __init__(
        self, scaler: Any, optimizers: Sequence[Any], device: torch.device, on_host: bool
    ) -> None:
        if scaler is not None and (
            isinstance(scaler, type) or not callable(getattr(scaler, "is_enabled", None))
        ):
            raise ConfigError(
                f"scaler= was given a {type(scaler).__name__}; it is a torch.amp.GradScaler, and "
                f"optimizers stand before it: "
                "step(optimizer, scaler=scaler), clip_(optimizer, scaler)"
            )
        self.enabled = scaler is not None and bool(scaler.is_enabled())
        self._records: list[dict[str, Any]] = []
        self._found: list[tuple[Tensor, ...]] = []
        self.inv_scale: Number | None = None
        self.is_scaled = [False] * len(optimizers)
        if scaler is None or not self.enabled:
            return
        if not optimizers:
            raise ConfigError(
                "scaler= needs the optimizer too: a scaler keeps its records by "
                "optimizer; use clip_(optimizer, scaler)"
            )
        chains = [unwrap_optimizer(optimizer) for optimizer in optimizers]
        within = [inner_optimizers(links[-1]) for links in chains]
        try:
            lost = scaler._scale is None
            known = scaler._per_optimizer_states
            # which of them the user passes to unscale_ and step is not known yet: all are recorded
            records = [[known[id(o)] for o in links] for links in chains]
            stages = [{record["stage"] for record in links} for links in records]
            dealt_with = [
                [o for o in inner if known[id(o)]["stage"] is not OptState.READY]
                for inner in within
            ]
            self._records = [
                *chain.from_iterable(records),
                *(known[id(o)] for o in chain.from_iterable(within)),
            ]
            self._found = [
                tuple(record["found_inf_per_device"].values()) for record in self._records
            ]
        except (AttributeError, KeyError, TypeError) as error:
            raise ConfigError(
                f"scaler is a {type(scaler).__name__} that keeps its records in a way unknown to "
                f"distclip ({error!r}); "
                "pass a torch.amp.GradScaler or ShardedGradScaler of a torch that distclip names "
                "as supported"
            ) from error
        if lost:
            raise ConfigError(
                "this scaler has not scaled a loss yet; call "
                "scaler.scale(loss).backward() before clipping"
            )
        if any(OptState.STEPPED in stage for stage in stages):
            raise ConfigError(
                "scaler.step() was already called for this optimizer since "
                "scaler.update(); clip before it"
            )
        self.is_scaled = [stage == {OptState.READY} for stage in stages]
        for k, (scaled, inner) in enumerate(zip(self.is_scaled, dealt_with, strict=True)):
            if scaled and inner:
                outer, name = type(chains[k][-1]).__name__, type(inner[0]).__name__
                raise ConfigError(
                    f"the scaler has unscaled the {name} inside optimizer {k} ({outer}), and knows "
                    f"nothing of the {outer} that was passed "
                    f"here: gradients would be unscaled twice. Call scaler.unscale_() with the "
                    f"{outer}, or leave unscaling to the clipper"
                )
        inv_scale = scaler._scale.double().reciprocal().to(device)
        self.inv_scale = float(inv_scale) if on_host else inv_scale

    def found_inf(self, device: torch.device) -> Tensor | None:
        """[] float64: above 0 where the user's own `unscale_` met inf or NaN on this rank, in
        whichever parameter. None where nothing was unscaled yet."""
        found: Tensor | None = None
        for value in chain.from_iterable(self._found):
            here = value.to(device, torch.float64).reshape(())
            found = here if found is None else torch.maximum(found, here)
        return found

    def with_inv_scale(self, inv_scale: float) -> ScalerState:
        """The same, with the inverse scale as a number that the host has read."""
        known = copy(self)
        known.inv_scale = inv_scale
        return known

    def record_found_inf(self, found_inf: Flag, stepped: bool) -> None:
        """Record for every optimizer what all ranks agreed on, so that scalers stay equal. Sends
        nothing, reads nothing on the host.

        Args:
            found_inf: true where the step is not to be taken.
            stepped: whether the optimizers were stepped (or skipped) already; else the user's
                `scaler.step` does it.
        """
        if not self._records:
            return
        value = torch.as_tensor(found_inf)
        for record in self._records:
            own = value.to(torch.float32, copy=True)
            record["found_inf_per_device"] = {own.device: own}
            record["stage"] = OptState.STEPPED if stepped else OptState.UNSCALED


NO_SCALER = ScalerState(None, (), torch.device("cpu"), on_host=True)
