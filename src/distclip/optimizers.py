"""Which optimizer steps which pieces. Computed once for each optimizer, and again when its param
groups change."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from distclip.errors import ConfigError
from distclip.passed import as_list
from distclip.records import ParamPiece
from distclip.torch_internals.grad_scaler import inner_optimizers, unwrap_optimizer


class OptimizerParams(NamedTuple):
    """One optimizer, seen from the plan."""

    given: Any  # as the caller passed it, perhaps a wrapper
    optimizer: Any  # what is stepped: a wrapper that does more than forward is stepped itself
    pieces: frozenset[int]  # that it steps
    unmanaged: tuple[Tensor, ...]  # parameters that it steps and the clipper does not know
    # names and parameters, of the unmanaged ones, that it got after the clipper first saw it
    added_later: tuple[tuple[str, Tensor], ...]
    group: int | None  # the one group of all its pieces
    step_needs: str | None  # what its `step` cannot do without
    # those of its pieces that have a gradient and, as `grad_of` says, none for the clipper
    hidden: tuple[Tensor, ...] = ()

    @property
    def unclipped_params(self) -> tuple[Tensor, ...]:
        """Parameters that it steps and that are not clipped."""
        return (*self.unmanaged, *self.hidden)


class _IndexEntry(NamedTuple):
    """What is cached of an optimizer: nothing that would keep it alive."""

    optimizer: Callable[[], Any]
    # the lists of its param groups, with their lengths: the objects, since a list's identity may
    # be another's next
    lists: tuple[tuple[Any, int], ...]
    params: tuple[Tensor, ...]  # empty where they are not compared one by one
    found: OptimizerParams  # without the optimizer


class OptimizerIndex:
    """Remembers what each optimizer steps, for as long as it lives and its param groups stay.

    Args:
        members: [pieces] the parameters; group_of: [pieces] their groups.
        by_tensor: parameters were passed without modules, in which replacements would show;
            optimizers' parameters are compared at each call.
        grad_of: where a parameter's gradient is; None for `.grad`.

    Attributes:
        ids_by_group: identities of the parameters of each group that has some here.
    """

    def __init__(
        self,
        members: Sequence[Tensor],
        group_of: Sequence[int],
        by_tensor: bool,
        grad_of: Callable[[Tensor], Tensor | None] | None = None,
    ) -> None:
        self._members = members
        self._piece_of = {id(param): i for i, param in enumerate(members)}
        self._group_of = group_of
        self.ids_by_group: dict[int, set[int]] = defaultdict(set)
        for param, group in zip(members, group_of, strict=True):
            self.ids_by_group[group].add(id(param))
        self._by_tensor, self._grad_of = by_tensor, grad_of
        self._entries: dict[int, _IndexEntry] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy's parameters have identities of their own."""
        given = self._members, self._group_of, self._by_tensor, self._grad_of
        return OptimizerIndex, given

    def params_of(self, given: Any) -> OptimizerParams:
        """What the optimizer steps, a wrapper's inner ones too."""
        optimizer = unwrap_optimizer(given)[-1]
        groups = param_groups_of(optimizer)
        entry = self._entries.get(id(optimizer))
        if entry is not None and entry.optimizer() is not optimizer:
            entry = None
        if (
            entry is None
            or not _same_lists(entry.lists, groups)
            or (self._by_tensor and not _same_params(entry.params, groups))
        ):
            entry = self._entries[id(optimizer)] = self._look_at(optimizer, groups, entry)
        found = entry.found._replace(given=given, optimizer=optimizer)
        return found if self._grad_of is None else found._replace(hidden=self._hidden_params(found))

    def _hidden_params(self, found: OptimizerParams) -> tuple[Tensor, ...]:
        assert self._grad_of is not None
        params = (self._members[i] for i in found.pieces)
        return tuple(p for p in params if p.grad is not None and self._grad_of(p) is None)

    def _look_at(
        self, optimizer: Any, groups: Sequence[dict[str, Any]], before: _IndexEntry | None
    ) -> _IndexEntry:
        params = {id(param): param for group in groups for param in group["params"]}
        pieces = frozenset(i for key in params if (i := self._piece_of.get(key)) is not None)
        unmanaged = {key: param for key, param in params.items() if key not in self._piece_of}
        added: list[tuple[str, Tensor]] = []
        if before is not None:
            added_before = {id(param) for _, param in before.found.added_later}
            accepted = {id(param) for param in before.found.unmanaged} - added_before
            names = _param_names(groups)
            added = [
                (names.get(key, f"shape {tuple(param.shape)}"), param)
                for key, param in unmanaged.items()
                if key not in accepted
            ]
        its_groups = {self._group_of[i] for i in pieces}
        every = (optimizer, *inner_optimizers(optimizer))
        found = OptimizerParams(
            given=None,
            optimizer=None,
            pieces=pieces,
            unmanaged=tuple(unmanaged.values()),
            added_later=tuple(added),
            group=its_groups.pop() if len(its_groups) == 1 else None,
            step_needs=next((needs for each in every if (needs := _step_needs(each))), None),
        )
        return _IndexEntry(
            optimizer=_weak_reference(optimizer, _EntryRemover(self._entries, id(optimizer))),
            lists=tuple((group["params"], len(group["params"])) for group in groups),
            params=tuple(_params_in(groups)) if self._by_tensor else (),
            found=found,
        )


@dataclass(slots=True)
class _EntryRemover:
    """Removes an optimizer's entry when it is gone: its id may be reused."""

    entries: dict[int, _IndexEntry]
    key: int

    def __call__(self, _: Any) -> None:
        self.entries.pop(self.key, None)


def _weak_reference(optimizer: Any, gone: Callable[[Any], None]) -> Callable[[], Any]:
    try:
        return ref(optimizer, gone)
    except TypeError:  # a wrapper with slots and no room for a weak reference
        return lambda: optimizer


def param_groups_of(optimizer: Any) -> list[dict[str, Any]]:
    """Its own param groups, and those of the optimizers inside it, which may have got more
    since."""
    if type(optimizer).__module__.partition(".")[0] == "torch":
        return list(getattr(optimizer, "param_groups", ()))
    holders = [optimizer, *inner_optimizers(optimizer)]
    groups = chain.from_iterable(getattr(holder, "param_groups", ()) for holder in holders)
    return list({id(group): group for group in groups}.values())


def _params_in(groups: Sequence[dict[str, Any]]) -> Iterable[Tensor]:
    return chain.from_iterable(group["params"] for group in groups)


def _same_lists(lists: Sequence[tuple[Any, int]], groups: Sequence[dict[str, Any]]) -> bool:
    """Whether param groups hold the same lists, of the same lengths."""
    if len(lists) != len(groups):
        return False
    for (params, length), group in zip(lists, groups, strict=True):
        if params is not group["params"] or length != len(params):
            return False
    return True


def _same_params(before: Sequence[Tensor], groups: Sequence[dict[str, Any]]) -> bool:
    """Of as many as before: whether they are the same objects."""
    return all(map(is_, before, _params_in(groups)))


def _param_names(groups: Sequence[dict[str, Any]]) -> dict[int, str]:
    """Parameter → its name, where the optimizer was given names."""
    return {
        id(param): name
        for group in groups
        for param, name in zip(group["params"], group.get("param_names") or (), strict=False)
    }


def params_without_plan(
    owned: Sequence[OptimizerParams], pieces: Sequence[ParamPiece]
) -> list[str]:
    """A text for each optimizer that holds none of the clipper's parameters."""
    return [
        f"optimizer {i} ({type(o.optimizer).__name__}) holds none of this clipper's parameters "
        f"(the first of which is {pieces[0].name}); "
        "build optimizers after the model was wrapped and sharded, and pass those that step it"
        for i, o in enumerate(owned)
        if not o.pieces and pieces
    ]


def params_added_later(owned: Sequence[OptimizerParams]) -> list[str]:
    """A text for each optimizer that was given parameters, after the clipper first saw it, that the
    clipper does not know."""
    return [
        f"optimizer {i} ({type(o.optimizer).__name__}) was given "
        f"{_count_text(len(new), 'parameter')} "
        f"later that this clipper does not know "
        f"(the first: {new[0]}); call clipper.rebuild() on all ranks, with the parameters as they "
        f"are now where pairs or a list were "
        "passed: clipper.rebuild(params)"
        for i, o in enumerate(owned)
        if (new := [name for name, param in o.added_later if param.requires_grad])
    ]


def unmanaged_params(owned: Sequence[OptimizerParams]) -> list[str]:
    """A text for each optimizer that steps more than the clipper knows, by intent or not."""
    return [
        f"optimizer {i} ({type(o.optimizer).__name__}) steps {_count_text(len(more), 'parameter')} "
        f"that "
        f"this clipper does not know (the first "
        f"has shape {tuple(more[0].shape)}): they are neither clipped nor in the norm. Build the "
        f"clipper with them if that is not meant"
        for i, o in enumerate(owned)
        if (
            more := [
                param for param in o.unmanaged if param.requires_grad and param.grad is not None
            ]
        )
    ]


def _count_text(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


# What was passed in an optimizer's place


def as_optimizers(given: Any) -> tuple[Any, ...]:
    """`clip_` takes one optimizer, several, or none. A container that steps is one, even if its
    optimizers can be listed."""
    if given is None:
        return ()
    if type(given) in (list, tuple):
        return tuple(given)
    if is_optimizer(given) or isinstance(given, (Tensor, nn.Module, str, Mapping)):
        return (given,)
    items = as_list(given)
    return (given,) if items is None else tuple(items)


def is_optimizer(thing: Any) -> bool:
    """Whether it steps parameters that it names: torch's optimizers, wrappers of them, containers
    of several."""
    if isinstance(thing, (type, nn.Module, LRScheduler)) or not callable(
        getattr(thing, "step", None)
    ):
        return False
    return hasattr(thing, "param_groups") or (
        bool(inner_optimizers(thing)) and not hasattr(thing, "get_last_lr")
    )


def check_optimizers(operation: str, optimizers: Sequence[Any]) -> None:
    """ConfigError if something else than an optimizer was passed, or one twice."""
    for thing in optimizers:
        if not is_optimizer(thing):
            raise ConfigError(f"{operation}() was given {_describe_mistake(thing)}")
        if getattr(thing, "_overlap_with_ddp", False):  # torch's ZeroRedundancyOptimizer
            raise ConfigError(
                f"{operation}() was given a {type(thing).__name__} with overlap_with_ddp=True: it "
                "steps inside backward(), before the global norm is known, and would not be "
                "clipped; build it without overlap_with_ddp"
            )
    if len(optimizers) > 1:
        steps = [unwrap_optimizer(optimizer)[-1] for optimizer in optimizers]
        every = [id(o) for optimizer in steps for o in (optimizer, *inner_optimizers(optimizer))]
        if len(set(every)) < len(every):
            again = "; it would step twice" if operation == "step" else ""
            raise ConfigError(f"{operation}() was given one optimizer twice{again}")


def check_step_signatures(owned: Sequence[OptimizerParams]) -> None:
    """ConfigError if `step()` without arguments is not what an optimizer can do."""
    for o in owned:
        if o.step_needs:
            raise ConfigError(
                f"{type(o.optimizer).__name__}.{o.step_needs}, and the clipper calls it "
                f"once, with nothing; {_IN_THE_CLOSURE}"
            )


_IN_THE_CLOSURE = (
    "clip inside the closure instead: def closure(): optimizer.zero_grad(); loss = ...; "
    "loss.backward(); clipper.clip_(); return loss, "
    "and then optimizer.step(closure)"
)


def _step_needs(optimizer: Any) -> str | None:
    """What its `step` cannot do without, as a text. Read off the class: schedulers put wrappers of
    another signature on the object."""
    kind = type(optimizer)
    if hasattr(kind, "first_step") and hasattr(kind, "second_step"):
        return "step() takes two steps with a closure between them"
    own = vars(optimizer).get("step") if hasattr(optimizer, "__dict__") else None
    if own is not None and not hasattr(own, "_wrapped_by_lr_sched"):
        return None  # the caller put a step of its own there
    try:
        _, *arguments = inspect.signature(kind.step).parameters.values()
    except (AttributeError, TypeError, ValueError):
        return None
    required = [
        a.name
        for a in arguments
        if a.default is a.empty and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)
    ]
    return f"step() needs {', '.join(required)}" if required else None


def _describe_mistake(thing: Any) -> str:
    """What it is, and what to write instead."""
    name = type(thing).__name__
    if hasattr(thing, "unscale_"):
        return (
            f"a {name} in an optimizer's place; write step(optimizer, scaler=scaler) or "
            f"clip_(optimizer, scaler)"
        )
    if isinstance(thing, LRScheduler) or hasattr(thing, "get_last_lr"):
        return (
            f"a {name}, which schedules learning rates; pass the optimizer, and call "
            f"scheduler.step() afterwards"
        )
    if isinstance(thing, type):
        return f"the class {thing.__name__}; pass an optimizer that was built from it"
    if isinstance(thing, nn.Module):
        return (
            f"a {name}, which is a module: the clipper knows its parameters already. Pass "
            f"optimizers"
        )
    if isinstance(thing, Tensor):
        return (
            "a tensor; the clipper knows its parameters already. Pass optimizers, or nothing "
            "to "
            "clip_()"
        )
    if isinstance(thing, (int, float)):
        return (
            f"{thing!r}; the threshold is said once, GradClipper(model, max_norm=...). Pass "
            f"optimizers, or nothing to clip_()"
        )
    if isinstance(thing, (list, tuple, dict)):
        return f"a {name}; pass optimizers one by one: step(*optimizers)"
    if callable(thing):
        return f"a function in an optimizer's place, and takes no closure; {_IN_THE_CLOSURE}"
    return (
        f"{'None' if thing is None else f'a {name}'}, which is no optimizer: it has no step(), "
        f"or names no parameters to step"
    )
