"""Stage 3b: which optimizer steps which pieces. Worked out once for each optimizer, not at each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer

from distclip.amp import innermost
from distclip.records import Piece


@dataclass(frozen=True, slots=True)
class Owned:
    """One optimizer, seen from the plan."""

    given: Optimizer  # as the caller passed it, perhaps a wrapper
    optimizer: Optimizer  # the innermost one
    pieces: frozenset[int]  # that it steps
    others: tuple[Tensor, ...]  # parameters that it steps and the clipper does not know
    group: int | None  # the one group of all its parameters, if there are no others and no second group


class Share(NamedTuple):
    """What is remembered of an optimizer: nothing that would keep it alive."""

    signature: tuple[tuple[int, int], ...]  # of its param groups
    pieces: frozenset[int]
    others: tuple[Tensor, ...]
    group: int | None


class Owners:
    """Remembers what each optimizer owns, for as long as it lives and its param groups stay.

    Args:
        members: [pieces] the parameters; group_of: [pieces] their groups.
    """

    def __init__(self, members: Sequence[Tensor], group_of: Sequence[int]) -> None:
        self._piece = {id(param): i for i, param in enumerate(members)}
        self._group_of = group_of
        self._known: WeakKeyDictionary[Optimizer, Share] = WeakKeyDictionary()

    def of(self, optimizer: Optimizer) -> Owned:
        inner = innermost(optimizer)
        signature = tuple((id(group["params"]), len(group["params"])) for group in inner.param_groups)
        known = self._known.get(optimizer)
        if known is None or known.signature != signature:
            known = self._known[optimizer] = self._share(inner, signature)
        return Owned(optimizer, inner, known.pieces, known.others, known.group)

    def _share(self, inner: Optimizer, signature: tuple[tuple[int, int], ...]) -> Share:
        params: list[Tensor] = [param for group in inner.param_groups for param in group["params"]]
        pieces = [i for param in params if (i := self._piece.get(id(param))) is not None]
        others = tuple(param for param in params if id(param) not in self._piece and param.requires_grad)
        groups = {self._group_of[i] for i in pieces}
        group = groups.pop() if len(groups) == 1 and not others else None
        return Share(signature, frozenset(pieces), others, group)


def strangers(owned: Sequence[Owned], pieces: Sequence[Piece]) -> list[str]:
    """A text for each optimizer that holds none of the clipper's parameters."""
    return [
        f"optimizer {i} ({type(o.optimizer).__name__}) holds none of this clipper's parameters (the first of which is {pieces[0].name}); "
        "build optimizers after the model was wrapped and sharded, and pass those that step it"
        for i, o in enumerate(owned)
        if not o.pieces and pieces
    ]
