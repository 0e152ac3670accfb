"""Stage 3: this rank's part of the message. Whatever goes wrong here travels in it, so that no rank
waits for another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from distclip.errors import GradientError
from distclip.exchange.channel import hash64
from distclip.exchange.message import MessageLayout
from distclip.kernels.reference import SUMMED
from distclip.kernels.tensor_list import TensorList
from distclip.measure.collect import Collector, Grads, Present
from distclip.measure.units import Units, UnitStep
from distclip.optimizers import params_added_later, params_without_plan
from distclip.p_norm import norm_of, rounded
from distclip.policies import LocalGrads, LocalStats
from distclip.policies.assignment import PolicyAssignment
from distclip.policies.validate import validate_stats
from distclip.records import Norms
from distclip.request import Request
from distclip.setup.late_parameters import LateParameters
from distclip.setup.placement import DEVICES
from distclip.setup.plan import Plan
from distclip.setup.unfinished_backward import Wrapper, unfinished
from distclip.torch_internals.dtensor import local_tensor

_MIXER = -7046029254386353131


@dataclass(slots=True)
class LocalMeasurement:
    """What one call measured on this rank; kept until it is judged."""

    step: int
    call: Request
    grads: Grads | None  # None once they may have changed
    faults: list[str]  # what this rank found wrong
    last: Tensor | float  # [1] float64: the token of the decision before
    sums: Tensor  # [pieces] float64
    has: Tensor  # [pieces] float64
    units: UnitStep | None = None


class GlobalNorms(NamedTuple):
    """What all ranks learned."""

    norms: Norms
    power: Tensor  # [] float64: power sum over all groups
    layers: Tensor  # [layers] float64: watched norms
    cut: Tensor  # [cut units] float64: coefficients of units that are cut over ranks


@dataclass(slots=True)
class LocalMeasurer:
    """Prepared at set-up."""

    plan: Plan
    collector: Collector
    wire: MessageLayout
    parts: Sequence[PolicyAssignment]
    units: Units | None
    in_total: Tensor | None  # [groups] bool: which groups count in the total; None where all do
    device: torch.device
    config: str  # the options as a text, equal on all ranks
    bits: int  # of what policies see: see `measure.rounded`
    newcomers: LateParameters
    wrappers: Sequence[Wrapper]  # modules that may leave gradients unfinished
    _nothing: Tensor = field(init=False)  # [pieces]
    _none: Tensor = field(init=False)  # [0]
    _everything: Grads = field(init=False)  # all parameters, as if they were gradients
    _chosen: dict[tuple[int, ...], tuple[Present, tuple[list[int], Tensor, Tensor, Tensor]]] = (
        field(init=False, default_factory=dict)
    )
    # which are there, and what the message says of it
    _said: tuple[Tensor, Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._nothing = torch.zeros(len(self.plan.pieces), dtype=torch.float64, device=self.device)
        self._none = self._nothing[:0]
        every = range(len(self.plan.pieces))
        self._everything = Grads(self.collector.present(every, every), TensorList.of(()))

    @property
    def policy_words(self) -> int:
        return self.wire.stats - 2 * (self.units.cut if self.units else 0)

    def sense(
        self, step: int, call: Request, last: Tensor | float
    ) -> tuple[LocalMeasurement, Tensor]:
        """Never communicates, raises nothing. The message: [words] float64 on the compute device.

        Args:
            last: the token of the decision before: its number where the host reads at once, else
                [1] float64.
        """
        sums = has = self._nothing
        stats = self._nothing.new_zeros(self.wire.stats) if self.wire.stats else self._none
        found = units = None
        grads, faults = self._everything, list[str]()
        try:
            faults = unfinished(self.wrappers) if call.of == "grad" else []
            if not faults:  # else gradients may not even be where they will be
                grads = self.collector.collect() if call.of == "grad" else self._parameters()
                # what stands first names the parameter; what follows from it is not reported
                faults = (
                    grads.faults
                    or self.newcomers.faults(of_params=call.of == "param")
                    or params_added_later(call.owned)
                    or params_without_plan(call.owned, self.plan.pieces)
                    + self._left_scaled(call, grads)
                )
            if not faults and call.problem is None:
                own = (
                    grads.list.power_sums(self.wire.norm_type).to(self.device)
                    if grads.list.tensors
                    else self._none
                )
                if grads.present.portion is not None and math.isfinite(self.wire.norm_type):
                    own = own * grads.present.portion
                powers = call.powers(grads.present.own, self.wire.norm_type, self.device)
                sums, has = (
                    self._placed(grads, own if powers is None else own * powers),
                    grads.present.has,
                )
                found = self._found(call)
                if call.of == "grad" and stats.numel():
                    units = self._stats(stats, grads, call.scales(grads.present.own, self.device))
        except Exception as error:
            faults = [*faults, f"{type(error).__name__}: {error}"]
        message = self.wire.pack(
            sums,
            stats,
            self._words(sums, has, found, bool(faults or call.problem), step, call, last),
        )
        return LocalMeasurement(step, call, grads, faults, last, sums, has, units), message

    def _present(self, has: Tensor) -> Tensor:
        """What the message says of gradients that are there; worked out anew only when others
        are."""
        if self._said is None or self._said[0] is not has:
            self._said = (has, self.wire.present(has))
        return self._said[1]

    def _left_scaled(self, call: Request, grads: Grads) -> list[str]:
        """With a scaler every gradient belongs to an optimizer that was passed: its records say
        whether the gradient is still scaled."""
        if not call.hands.enabled or call.of == "param":
            return []
        left = sorted(set(grads.present.all).difference(*(owned.pieces for owned in call.owned)))
        if not left:
            return []
        return [
            f"{self.plan.pieces[left[0]].name} has a scaled gradient and is in none of the "
            f"optimizers that were passed ({len(left)} "
            f"parameter{'s' if len(left) > 1 else ''} in all); pass all of the scaler's optimizers "
            f"in one call"
        ]

    def _parameters(self) -> Grads:
        local = [local_tensor(p.detach()) for p in self.collector.members]
        for piece, tensor in zip(self.plan.pieces, local, strict=True):
            if tensor.dtype not in SUMMED or tensor.device.type not in DEVICES:
                raise GradientError(
                    f"measure(of='param'): {piece.name} is "
                    f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}, of which no "
                    f"norm "
                    "can be computed; build a clipper of the parameters that have one"
                )
        return Grads(self._everything.present, TensorList.of(local))

    def _found(self, call: Request) -> Tensor | None:
        """[] float64 above 0: a scaler met inf or NaN here, or a gradient that is stepped and not
        clipped holds some."""
        found = call.hands.found(self.device) if call.hands.enabled else None
        others = call.others() if call.guards else []
        if not others:  # an empty answer lies on the CPU, and sending it would make the host wait
            return found
        bad = (
            (~TensorList.of(others).power_sums(math.inf).to(self.device).isfinite()).sum().double()
        )
        return bad if found is None else torch.maximum(found, bad)

    def _placed(self, grads: Grads, values: Tensor) -> Tensor:
        """[pieces]: the values of the list in their places, 0 elsewhere."""
        index = grads.present.index
        return values if index is None else self._nothing.index_copy(0, index, values)

    def _stats(self, stats: Tensor, grads: Grads, scale: Tensor) -> UnitStep | None:
        """What policies want to know besides the norm."""
        step = None
        if self.units is not None:
            step = self.units.measure(grads, scale)
            stats[self.policy_words :] = step.words.flatten()
        for part in self.parts:
            if step is not None and hasattr(part.policy, "unit_coefs"):
                stats[part.stats] = step.table[part.index].flatten()
            elif isinstance(part.policy, LocalStats):
                stats[part.stats] = validate_stats(
                    part, part.policy.local_stats(self._local(part, grads, scale))
                )
        return step

    def _local(self, part: PolicyAssignment, grads: Grads, scale: Tensor) -> LocalGrads:
        """The gradients of one policy's groups."""
        known = self._chosen.get(part.groups)
        if known is None or known[0] is not grads.present:
            known = self._chosen[part.groups] = (grads.present, self._choice(part, grads.present))
        mine, at, group, share = known[1]
        listed = (
            grads.list
            if len(mine) == len(grads.list.tensors)
            else TensorList.of([grads.list.tensors[n] for n in mine])
        )
        return LocalGrads(listed, group, share, scale[at], len(part.groups), self.wire.norm_type)

    def _choice(
        self, part: PolicyAssignment, present: Present
    ) -> tuple[list[int], Tensor, Tensor, Tensor]:
        """Positions in the list, and on the compute device: the same, their groups, their
        shares."""
        place = {group: i for i, group in enumerate(part.groups)}
        mine = [n for n, i in enumerate(present.own) if self.plan.group_of[i] in place]
        pieces = [present.own[n] for n in mine]
        group = torch.tensor(
            [place[self.plan.group_of[i]] for i in pieces], dtype=torch.int64, device="cpu"
        )
        portions = present.portions or [1.0] * len(present.own)
        shares = [
            portions[n] / self.plan.shares[i].holders for n, i in zip(mine, pieces, strict=True)
        ]
        share = torch.tensor(shares, dtype=torch.float64, device="cpu")
        return (
            mine,
            torch.tensor(mine, dtype=torch.int64, device="cpu").to(self.device),
            group.to(self.device),
            share.to(self.device),
        )

    def _words(
        self,
        sums: Tensor,
        has: Tensor,
        found: Tensor | None,
        wrong: bool,
        step: int,
        call: Request,
        last: Tensor | float,
    ) -> Tensor:
        """The message behind drift: see `MessageLayout.pack`."""
        tokens, second = (
            [float(step & 0xFFFF), float(_token(call.text + self.config))],
            self.wire.second,
        )
        present, scale = self._present(has), call.hands.inverse
        mixed: Tensor | float = 0.0
        if scale is not None:  # one that differs between ranks is a disagreement
            mixed = (scale.reshape(1).view(torch.int64) * _MIXER) >> 40 & 0xFFFF
        if not isinstance(last, Tensor):  # the host reads: one tensor made of numbers
            bad = 0.0 if math.isfinite(sums.sum()) else float(self.wire.bad(sums))
            bad = bad if found is None else max(bad, float(found))
            tokens.append((last + float(mixed)) % 0x10000)
            words = [*present.tolist(), bad, float(wrong), *tokens, *map(second, tokens)]
            return torch.tensor(words, dtype=torch.float64, device="cpu")
        # filled in on the device: a tensor made from a list would make the host wait for it
        bad = self.wire.bad(sums).reshape(1)
        bad = bad if found is None else torch.maximum(bad, found)
        v = torch.cat([*(last.new_full((1,), token) for token in tokens), (last + mixed) % 0x10000])
        return torch.cat([present, bad, last.new_full((1,), float(wrong)), v, second(v)])

    def read(self, message: Tensor) -> GlobalNorms:
        """The reduced message, as numbers that are equal on every rank and do not depend on the
        sharding: rounded. No host sync.

        Whether they are finite is read before.
        """
        p = self.wire.norm_type
        sums, layers, stats, bad = self.wire.sums(message)
        cut = self._none
        if self.units is not None:
            cut, table = self.units.judge(stats[self.policy_words :].view(2, -1))
            stats = stats[: self.policy_words].clone()
            for part in self.parts:
                if hasattr(part.policy, "unit_coefs"):
                    stats[part.stats] += table[part.index].flatten()
        power, groups = self.wire.total(message), rounded(norm_of(sums, p), self.bits)
        if self.in_total is None and len(sums) == 1:
            total = groups[0]
        else:
            counted = sums if self.in_total is None else torch.where(self.in_total, sums, 0.0)
            total = rounded(
                norm_of(counted.amax() if math.isinf(p) else counted.sum(), p), self.bits
            )
        finite = (power - power).eq(bad)  # bad is 0, and x - x is not NaN as for inf and NaN
        watched = rounded(norm_of(layers, p), self.bits) if len(layers) else layers
        stats = rounded(stats, self.bits) if len(stats) else stats
        return GlobalNorms(Norms(groups, total, finite, bad.long(), stats, p), power, watched, cut)


@lru_cache(maxsize=64)
def _token(text: str) -> int:
    return hash64(text) & 0xFFFF
