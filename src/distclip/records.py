"""Frozen records handed from stage to stage. Shape, dtype and meaning stand beside each field."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement


@dataclass(frozen=True, slots=True)
class ParamHolding:
    """How this rank holds a part of a parameter. Pieces of one parameter are copies if their
    regions are equal and their rank sets overlap."""

    description: str  # as the plan prints it
    region: str  # which part: equal if and only if the data is the same
    # identities of the sets of ranks that hold copies or sibling parts; a set that two ranks share
    # joins them
    rank_sets: tuple[str, ...]
    # the meshes and wrappers' groups among them: their ranks work on one set of modules
    module_rank_sets: tuple[str, ...] = ()
    # by `replicated_over`: the rank sets are not extended to other ranks with the same modules
    declared: bool = False


@dataclass(frozen=True, slots=True)
class ParamPiece:
    """The part of one parameter that this rank holds."""

    name: str  # as the user knows it, wrapper prefixes stripped
    key_name: str  # the name under which it is agreed: the first of a `shared=` tuple, else `name`
    holding: ParamHolding
    shape: tuple[int, ...]  # of the whole parameter
    numel: int  # of the whole parameter
    local_shape: tuple[int, ...]  # of this rank's gradient tensor
    placements: tuple[Placement, ...] | None  # of the gradient, where it is a DTensor

    @property
    def local_numel(self) -> int:
        count = 1
        for size in self.local_shape:
            count *= size
        return count


class PieceShare(NamedTuple):
    """What the set-up agreed on for one piece."""

    num_replicas: int  # h: it counts 1/h here
    drift_weight: (
        float  # of the drift sum: zero-sum over the holders, at least 1/8 in size where h > 1
    )


@dataclass(frozen=True, slots=True)
class OwnershipRow:
    """One line of the ownership table: parameters that are held alike over the same ranks."""

    parameters: int
    elements: int  # of the whole parameters
    description: str
    ranks: tuple[int, ...]
    copies: int  # h


@dataclass(frozen=True, slots=True)
class Norms:
    """The reduced value: equal on every rank, bit for bit, and whichever way the model is sharded.

    That is why norms and stats are rounded to float32's precision (24 bits, in float64's range):
    the order in which a norm is added up changes the bits behind. To 48 bits where some parameter
    is float64; a sum's own error then reaches the last one now and then.
    """

    per_group: Tensor  # [groups] float64: norm of each group, before clipping
    total: Tensor  # [] float64: norm over the groups that count in the total
    finite: Tensor  # [] bool: total, every group and every gradient tensor are finite
    # [] int64: gradient tensors with inf or NaN over all ranks (with p = inf: the largest count of
    # a rank)
    nonfinite: Tensor
    stats: Tensor  # [stats] float64: what the policy's `local_stats` added, group by group
    norm_type: float  # p


# Beyond so many robust deviations from the others a rank is an outlier.
RANK_DEVIATIONS = 8.0
# What `report.action` may be, the mildest first.
ACTIONS = ("none", "skip", "lower_lr", "roll_back")


def farthest_rank(norms: Sequence[float]) -> tuple[int | None, float | None]:
    """The outlier among ranks' own norms, and the deviation of the rank that lies off the
    farthest; see `ClipReport.rank_deviation`."""
    if len(norms) < 3:
        return None, None
    logs = [math.log(n) if 0 < n < math.inf else math.nan for n in norms]
    known = [log for log in logs if log == log]
    middle = median(known) if known else 0.0
    spread = median([abs(log - middle) for log in known]) if known else 0.0
    off = [
        abs(log - middle) / max(1.4826 * spread, 1e-3) if log == log else math.inf for log in logs
    ]
    rank = max(range(len(off)), key=off.__getitem__)
    return rank if off[rank] > RANK_DEVIATIONS else None, off[rank]


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiply each group's gradients by its coefficient."""

    coef: Tensor  # [groups] float64
    threshold: Tensor  # [groups] float64, for the report
    # [] or [groups] bool: where any is true, the step is left out like one that is not finite
    skip: Tensor | None = None
    action: Tensor | None = None  # [] int64: what the loop should do, by its place in ACTIONS


@dataclass(frozen=True, slots=True)
class Clamp:
    """Clamp each group's elements to [-value, value]."""

    value: Tensor  # [groups] float64
    clipped: Tensor  # [groups] bool: some element on some rank was beyond its value
    norm_after: Tensor  # [groups] float64
    cosine: Tensor  # [groups] float64: between raw and clamped gradient; NaN where it is not known
    # [] or [groups] bool: where any is true, the step is left out like one that is not finite
    skip: Tensor | None = None
    action: Tensor | None = None  # [] int64: what the loop should do, by its place in ACTIONS


@dataclass(frozen=True, slots=True)
class UnitScale:
    """Multiply each unit (the weights into one output) by a coefficient of its own, which the ranks
    that hold the unit know."""

    threshold: Tensor  # [groups] float64, for the report
    clipped: Tensor  # [groups] bool: some unit on some rank has a coefficient below 1
    norm_after: Tensor  # [groups] float64
    # [] or [groups] bool: where any is true, the step is left out like one that is not finite
    skip: Tensor | None = None
    action: Tensor | None = None  # [] int64: what the loop should do, by its place in ACTIONS


class Culprit(NamedTuple):
    """A gradient tensor that is not finite."""

    parameter: str
    rank: int
    kind: str  # "inf" or "NaN"
    # the nearest parameters with a finite gradient, in the model's order on that rank: what went
    # wrong went wrong between them
    before: str | None = None
    after: str | None = None


class Note(NamedTuple):
    """What one rank said of one of its steps, by `note=`."""

    rank: int
    step: int
    note: Any  # as JSON reads it; the beginning of its JSON, a text, where it is cut
    cut: bool  # it was longer than 4 KiB, or there was no more room beside later ones


_CPU = torch.device("cpu")
_FITS = 1e38  # below it a number has a float32, which `torch.full` insists on
_FEW = 32  # numbers that are filled in on a device one by one


def _as_tensor(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number, or a list of them. The host does not wait for the device, as it would for what is
    copied there from ordinary memory."""
    if device.type == "cpu":
        if not isinstance(value, list) and -_FITS < value < _FITS:
            return torch.full((), value, dtype=dtype, device=device)  # in two thirds of the time
        return torch.tensor(value, dtype=dtype, device=device)
    if not isinstance(value, list):
        return torch.full((), value, dtype=torch.float64, device=device).to(dtype)
    numbers: list[float] = value
    if 0 < len(numbers) <= _FEW:
        parts = [torch.full((), n, dtype=torch.float64, device=device) for n in numbers]
        return torch.stack(parts).to(dtype)
    pinned = torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=len(numbers) > 0)
    return pinned.to(device, non_blocking=True)


class _TensorField:
    """A field of a report: a tensor, or Python's numbers, which become one when it is read."""

    def __init__(self, name: str, dtype: torch.dtype | None) -> None:
        self._name, self._dtype = name, dtype  # None: the report's own

    def __get__(self, report: ClipReport | None, owner: type | None = None) -> Any:
        if report is None:
            return self
        fields = report.__dict__
        if self._name not in fields:
            for name, number in fields.pop("_numbers")().items():
                fields.setdefault(name, number)
        value = fields[self._name]
        if callable(value):  # worked out for itself
            value = fields[self._name] = value()
        if not isinstance(value, Tensor):
            dtype = self._dtype or report.dtype
            value = fields[self._name] = _as_tensor(value, dtype, fields.get("_device", _CPU))
        return value

    def __set__(self, report: ClipReport, value: Any) -> None:
        report.__dict__[self._name] = value


_TENSORS = (
    "total_norm", "norm_after", "clipped", "skipped", "nonfinite", "coefs", "threshold",
    "group_norms", "cosine", "clip_rate", "skips", "layer_norms", "rung",
    "rank_norms",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class ClipReport:
    """What one call saw and did. All tensors are on the compute device and equal on every rank;
    reading one there is a host sync. On the CPU a tensor is made when it is first read.

    Norms are those after unscaling and `grad_scale`.
    """

    step: int  # calls of this clipper, from 1
    # [] float32 (float64 for float64 parameters): before clipping
    total_norm: Tensor
    norm_after: Tensor  # []: after it
    clipped: Tensor  # [] bool: some group was scaled or clamped
    # [] bool: the step is not taken: gradients were not finite, or (with nonfinite 0) the policy
    # left it out, or `ended_in` says why
    skipped: Tensor
    nonfinite: Tensor  # [] int64
    coefs: Tensor  # [groups]
    threshold: Tensor  # [groups]
    group_norms: Tensor  # [groups]: before clipping
    # [groups]: between raw and clamped gradient (1 where none is clamped; NaN with p = inf, where
    # it is not measured)
    cosine: Tensor
    clip_rate: Tensor  # []: share of the last steps, up to 500, that were clipped
    skips: Tensor  # [] int64: steps not taken so far
    rung: Tensor  # [] int64: the place of `action` in ACTIONS
    # [layers]: of the layers that `watch` asked for; in what sinks get, only at its interval and at
    # steps that matter
    layer_norms: Tensor
    # [ranks]: each rank's own, before its gradients were reduced, where RankNorms is asked for and
    # some were reduced since the last step; else empty
    rank_norms: Tensor
    groups: tuple[str, ...]
    layers: tuple[str, ...]  # names of `layer_norms`
    norm_type: float
    culprits: tuple[Culprit, ...] = ()
    # why the step matters, the first that holds: "skipped", "outlier" (more than 4 robust
    # deviations off, or not finite, or a rank begins to lie off the others: `outlier_rank`),
    # "largest" (among the ten largest so far); else None. On CUDA a
    # step that is judged at the next call has it, deviation, culprits and notes in the log alone
    matters: str | None = None
    # robust deviations (1.4826 MAD) of log(total_norm) from the median of the last steps, up to
    # 128, that were finite and taken; None before the 17th, and for a norm of 0, inf or NaN
    deviation: float | None = None
    # of a step that matters: all ranks' notes of it and of the two steps before, as far as they
    # were not sent before
    notes: tuple[Note, ...] = ()
    # of a step that ended in an error: its class, "NonFiniteError", "AgreementError" (copies
    # differ) or "GradientError" (too many steps in a row were left out, or clip_ could not leave
    # this one out); else None
    ended_in: str | None = None
    dtype: torch.dtype = torch.float32  # of norms, coefficients and rates

    @classmethod
    def deferred(
        cls,
        numbers: Callable[[], dict[str, Any]],
        others: dict[str, Any],
        device: torch.device | None = None,
    ) -> ClipReport:
        """A report whose numbers are worked out when one of them is first read.

        Args:
            numbers: gives all fields that are tensors.
            others: all other fields, and any of these; the report's from now on.
            device: where numbers are Python's: of the tensors that are made when they are read.
        """
        report = object.__new__(cls)
        others["_numbers"], others["_device"] = numbers, device or _CPU
        object.__setattr__(report, "__dict__", others)
        return report

    def on_host(self) -> ClipReport:
        """This report with tensors on the CPU, where its numbers are Python's: reading them waits
        for no device. The same report where they are the device's."""
        return self if self.__dict__.get("_device", _CPU) == _CPU else self._with(_device=_CPU)

    def ended(self, error: str) -> ClipReport:
        """This report of a step that ended in an error of that class."""
        return self._with(ended_in=error)

    def _with(self, **changes: Any) -> ClipReport:
        """A copy of which nothing is read."""
        report = object.__new__(ClipReport)
        report.__dict__.update(self.__dict__, **changes)
        return report

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: the numbers themselves."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def clip_coef(self) -> Tensor:
        """[]: the coefficient, where there is one group. ValueError where there are several: read
        `coefs`."""
        if len(self.groups) != 1:
            raise ValueError(
                f"clip_coef: this clipper has {len(self.groups)} groups; read "
                f"report.coefs and report.groups"
            )
        return self.coefs[0]

    @property
    def action(self) -> str:
        """What `Escalate` asks the loop to do: "none", "skip" (the step was left out), "lower_lr"
        or "roll_back". On CUDA this waits for the device."""
        return ACTIONS[int(self.rung)]

    @property
    def rank_deviation(self) -> float | None:
        """By how many robust deviations (1.4826 MAD, but at least 0.1 %) the logarithm of one
        rank's own norm lies off the median of all, where it lies off the farthest; inf for a norm
        of 0, inf or NaN. None without RankNorms, and for fewer than three ranks. On CUDA this waits
        for the device."""
        return self._farthest_rank[1]

    @property
    def outlier_rank(self) -> int | None:
        """The rank, by its place in the clipper's group, that lies off by more than
        RANK_DEVIATIONS; else None. With few ranks some do by chance."""
        return self._farthest_rank[0]

    @property
    def _farthest_rank(self) -> tuple[int | None, float | None]:
        return farthest_rank(self.rank_norms.tolist())

    @property
    def group_shares(self) -> Tensor:
        """Which group dominates, [groups], as each one's share of the sum of p-th powers (with
        p = inf its norm relative to the largest)."""
        return self._shares(self.group_norms)

    @property
    def layer_shares(self) -> Tensor:
        """The same of the watched layers, [layers], where the report has them; else empty."""
        return self._shares(self.layer_norms) if self.layers else self.layer_norms.double()

    def _shares(self, norms: Tensor) -> Tensor:
        relative = norms.double() / norms.amax().clamp(min=1e-300)
        if math.isinf(self.norm_type):
            return relative
        powers = relative.pow(self.norm_type)
        return powers / powers.sum().clamp(min=1e-300)

    def packed(self) -> Tensor:
        """All tensors in one float64 vector, which can be copied to the host without waiting."""
        return torch.cat([getattr(self, name).reshape(-1).double() for name in _TENSORS])

    def unpacked(self, numbers: Sequence[float]) -> ClipReport:
        """This report with its tensors on the host, from the numbers that `packed` gave."""
        tensors, start = dict[str, Tensor](), 0
        for name in _TENSORS:
            own: Tensor = getattr(self, name)
            part = torch.tensor(
                numbers[start : start + own.numel()], dtype=torch.float64, device="cpu"
            )
            tensors[name], start = part.to(own.dtype).reshape(own.shape), start + own.numel()
        return replace(self, **tensors)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python numbers, lists and strings. This is the host read: it waits for the
        device."""
        here = self.on_host()
        out: dict[str, Any] = {"step": self.step} | {
            name: getattr(here, name).tolist() for name in _TENSORS
        }
        if len(self.groups) == 1:
            out["clip_coef"] = out["coefs"][0]
        out |= {
            "groups": list(self.groups),
            "layers": list(self.layers),
            "norm_type": self.norm_type,
        }
        out |= {"matters": self.matters, "deviation": self.deviation}
        rank, deviation = here._farthest_rank
        out |= {"outlier_rank": rank, "rank_deviation": deviation}
        out["action"] = ACTIONS[out.pop("rung")]
        out["culprits"] = [culprit._asdict() for culprit in self.culprits]
        out["notes"] = [note._asdict() for note in self.notes]
        out["ended_in"] = self.ended_in
        return out


_DTYPES: dict[str, torch.dtype] = {
    "clipped": torch.bool,
    "skipped": torch.bool,
    "nonfinite": torch.int64,
    "skips": torch.int64,
    "rung": torch.int64,
}
for _name in _TENSORS:
    setattr(ClipReport, _name, _TensorField(_name, _DTYPES.get(_name)))
