"""What the caller passed → named parameters, each with the wrappers around it. Sends nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DataParallel, DistributedDataParallel

from distclip.errors import ConfigError
from distclip.passed import as_list
from distclip.torch_internals.dtensor import is_dtensor
from distclip.torch_internals.fsdp1 import FlatShard, flat_shards

Params: TypeAlias = "nn.Module | Tensor | Iterable[nn.Module | Tensor | tuple[str, Tensor]]"

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")


@dataclass(frozen=True, slots=True)
class NamedParam:
    """A parameter, its name without wrapper prefixes, and the wrappers around it."""

    name: str
    param: Tensor
    ddp_groups: tuple[ProcessGroup, ...] = ()  # of the DDP modules around it
    shard: FlatShard | None = None  # its FSDP1 unit's
    positional: bool = False  # the name is only a number


@dataclass(frozen=True, slots=True)
class ModuleEntry:
    """Where a module keeps a parameter or a child, so that a replacement is noticed."""

    table: dict[str, Any]
    key: str
    value: Any
    path: str

    def is_replaced(self) -> bool:
        """True if the module holds another parameter or child under this name now.

        FSDP2 and TP × DDP swap sharded and plain tensors in and out; only a DTensor for a DTensor,
        or a plain one for a plain one, is a replacement.
        """
        now = self.table.get(self.key)
        if now is self.value:
            return False
        if isinstance(self.value, nn.Module):
            return True
        return isinstance(now, nn.Parameter) and is_dtensor(now) == is_dtensor(self.value)


@dataclass(slots=True)
class ParamScan:
    """All that was found in what the caller passed."""

    named: list[NamedParam] = field(default_factory=list)
    entries: list[ModuleEntry] = field(default_factory=list)
    # that were passed; empty where parameters were passed
    modules: list[nn.Module] = field(default_factory=list)
    # quantised parameters, which have no gradients
    whole_numbers: list[NamedParam] = field(default_factory=list)


def named_parameters(params: Params) -> ParamScan:
    """Parameters by name, each object once (a tied one under its first name).

    Raises:
        ConfigError: nothing or anything but parameters was passed, or two parameters have one name.
    """
    if isinstance(params, nn.Module):
        found = _scan_modules([params])
    elif isinstance(params, Tensor):
        found = ParamScan([NamedParam("0", params, positional=True)])
    else:
        found = _scan_items(_list_items(params))
    return _drop_duplicates(found)


def modules_in(params: Params) -> list[nn.Module]:
    """The modules among what the caller passed; none where parameters were."""
    if isinstance(params, nn.Module):
        return [params]
    return [m for m in _items_of(params) if isinstance(m, nn.Module)]


def _items_of(params: Any) -> Sequence[Any]:
    """What it holds, of whatever kind; nothing where it cannot be listed."""
    if isinstance(params, (Tensor, nn.Module)):
        return [params]
    return as_list(params) or ()


def tensors_in(params: Params) -> Iterator[Tensor]:
    """All parameters in what the caller passed, whatever else is wrong with it."""
    for module in modules_in(params):
        yield from module.parameters()
    yield from (
        part
        for item in _items_of(params)
        for part in (item if isinstance(item, tuple) else (item,))
        if isinstance(part, Tensor)
    )


def module_entries(modules: Iterable[nn.Module]) -> list[ModuleEntry]:
    """Where modules keep their parameters and children now."""
    entries: list[ModuleEntry] = []
    for module in modules:
        for _ in _walk_modules(module, "", (), entries, {}, seen=set()):
            pass
    return entries


def _list_items(params: Any) -> list[Any]:
    if hasattr(params, "param_groups"):
        raise ConfigError(
            f"params is a {type(params).__name__}, an optimizer; pass what it steps, "
            f"GradClipper(model, max_norm=...), and the "
            "optimizer to clipper.step(optimizer)"
        )
    if isinstance(params, Mapping):
        raise ConfigError(
            f"params is a {type(params).__name__}; pass its (name, parameter) pairs: "
            f"GradClipper(params.items(), ...)"
        )
    if not isinstance(params, Iterable) or isinstance(params, (str, bytes)):
        raise ConfigError(
            f"params is a {type(params).__name__}; pass an nn.Module, a list of modules, (name, "
            f"parameter) pairs or parameters"
        )
    return [*_items_of(params)]


def _scan_items(items: list[Any]) -> ParamScan:
    if items and all(isinstance(item, nn.Module) for item in items):
        return _scan_modules(items)
    found = ParamScan()
    for i, item in enumerate(items):
        if isinstance(item, Tensor):
            found.named.append(NamedParam(str(i), item, positional=True))
        elif (
            isinstance(item, tuple)
            and len(item) == 2
            and isinstance(item[0], str)
            and isinstance(item[1], Tensor)
        ):
            found.named.append(NamedParam(strip_wrappers(item[0]), item[1]))
        else:
            raise ConfigError(
                f"params[{i}] is a {type(item).__name__}; pass an nn.Module, a list of modules, "
                "(name, parameter) pairs or parameters, not a mixture with anything else"
            )
    return found


def _scan_modules(modules: list[nn.Module]) -> ParamScan:
    """Several modules are the pipeline stages of this rank; only where their names collide does
    each get its position before them."""
    walked = [_scan_module(module) for module in modules]
    names = Counter(named.name for found in walked for named in _distinct_params(found.named))
    prefix = any(count > 1 for count in names.values()) and len(modules) > 1
    out = ParamScan(modules=modules)
    for i, found in enumerate(walked):
        out.entries += found.entries
        for named in found.named:
            name = f"{i}.{named.name}" if prefix else named.name
            out.named.append(NamedParam(name, named.param, named.ddp_groups, named.shard))
    return out


def _scan_module(module: nn.Module) -> ParamScan:
    found = ParamScan()
    shards = flat_shards(module)
    for named in _walk_modules(module, "", (), found.entries, shards, seen=set()):
        found.named.append(named)
    return found


def _walk_modules(
    module: nn.Module,
    path: str,
    ddp_groups: tuple[ProcessGroup, ...],
    entries: list[ModuleEntry],
    shards: dict[int, FlatShard],
    seen: set[int],
) -> Iterator[NamedParam]:
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, DistributedDataParallel):
        ddp_groups = (*ddp_groups, cast(ProcessGroup, module.process_group))
        for name, param in module.module.named_parameters():
            if name in module.parameters_to_ignore:  # DDP does not synchronise these
                yield NamedParam(
                    strip_wrappers(f"{path}{name}"), param, ddp_groups[:-1], shards.get(id(param))
                )
    for key, param in module._parameters.items():
        if param is not None:
            name = strip_wrappers(f"{path}{key}")
            entries.append(ModuleEntry(module._parameters, key, param, name))
            yield NamedParam(name, param, ddp_groups, shards.get(id(param)))
    for key, child in module._modules.items():
        if child is not None:
            transparent = isinstance(module, (DistributedDataParallel, DataParallel))
            below = path if transparent or key in _WRAPPERS else f"{path}{key}."
            entries.append(
                ModuleEntry(module._modules, key, child, strip_wrappers(below).rstrip(".") or key)
            )
            yield from _walk_modules(child, below, ddp_groups, entries, shards, seen)


def strip_wrappers(name: str) -> str:
    """The name without the components that wrappers add."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def _distinct_params(named: list[NamedParam]) -> list[NamedParam]:
    first: dict[int, NamedParam] = {}
    for n in named:
        first.setdefault(id(n.param), n)
    return list(first.values())


def _drop_duplicates(found: ParamScan) -> ParamScan:
    """Each parameter object once; integer (quantised) ones apart."""
    floating: list[NamedParam] = []
    whole_numbers: list[NamedParam] = []
    for n in _distinct_params(found.named):
        is_floating = n.param.is_floating_point() or n.param.is_complex()
        (floating if is_floating else whole_numbers).append(n)
    twice = [name for name, count in Counter(n.name for n in floating).items() if count > 1]
    if twice:
        raise ConfigError(
            f"two different parameters are named {twice[0]!r}; pass (name, "
            f"parameter) pairs with distinct names"
        )
    return ParamScan(floating, found.entries, found.modules, whole_numbers)
