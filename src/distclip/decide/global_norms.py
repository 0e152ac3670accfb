"""The reduced message as norms that are equal on every rank and do not depend on the sharding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distclip.exchange.message import CHECK_WORDS, Message, MessageLayout
from distclip.measure.units import UnitClipper
from distclip.p_norm import rounded
from distclip.policies.assignment import PolicyAssignment
from distclip.policies.policy import UnitPolicy
from distclip.records import Norms
from distclip.values import Column, Flag, Number, as_column, as_tensor, each, fill

FEW = 32  # so many groups are faster as Python's numbers than as tensors


class GlobalNorms(NamedTuple):
    """What all ranks learned: floats and lists where the host reads at once, else tensors.

    Norms and stats are rounded: the order in which sums are added changes with the sharding.
    """

    # as `MessageLayout.read_checks` gives them
    power_sum: Number  # of all groups: what drift is compared with
    drift: Number
    presence: Number
    num_grads: Number
    nonfinite: Number
    errors: Number
    notes: Number
    agreed: Flag  # all ranks sent the same tokens
    finite: Flag  # every gradient, and their power sum
    # what policies and reports see
    per_group: Column  # before clipping
    total: Number  # over the groups that count in the total
    stats: Column  # what policies added
    layer_sums: Column  # power sums of what is watched, of which few reports show the norms
    split_unit_coefs: Tensor | None  # [units that are split over ranks] float64
    norm_type: float
    rank_norms: Column  # each rank's own, before the reduction; nothing where it is not asked for

    def shown_to(self, assignment: PolicyAssignment) -> Norms:
        """What a policy sees: tensors, of its own groups."""
        device = assignment.index.device
        per_group = as_tensor(self.per_group, torch.float64, device)
        stats = as_tensor(self.stats, torch.float64, device)
        total, finite = (_scalar(value, device) for value in (self.total, self.finite))
        nonfinite = _scalar(self.nonfinite, device).long()
        if not assignment.has_all:
            per_group = per_group[assignment.index]
            stats = stats[assignment.stats]
        return Norms(
            per_group=per_group,
            total=total,
            finite=finite,
            nonfinite=nonfinite,
            stats=stats,
            norm_type=self.norm_type,
        )


def read_norms(
    message: Message,
    layout: MessageLayout,
    in_total: Sequence[bool] | None,
    in_total_mask: Tensor | None,
    units: UnitClipper | None,
    assignments: Sequence[PolicyAssignment],
    bits: int,
) -> GlobalNorms:
    """Of a reduced message. No host sync.

    Args:
        in_total, in_total_mask: [groups] bool, on the host and on the compute device: which groups
            count in the total; None where all do.
        bits: how many a norm keeps.
    """
    norm = layout.norm
    sums: Column = message[layout.groups]
    on_host = isinstance(message, list)
    if layout.on_host and len(sums) > FEW:
        sums = torch.tensor(sums, dtype=torch.float64, device="cpu")

    # no function of both: it would be made and called anew at each step
    if isinstance(sums, Tensor):
        per_group: Column = rounded(norm.finish(sums), bits)
    else:
        per_group = [rounded(norm.finish(power_sum), bits) for power_sum in sums]
    if in_total is None and len(sums) == 1:
        total = per_group[0]
    else:
        counted = counted_in_total(sums, in_total, in_total_mask)
        total = rounded(norm.finish(norm.combine(counted)), bits)
        if on_host:
            total = float(total)
    stats, split_unit_coefs = message[layout.stats], None
    if units is not None:
        stats, split_unit_coefs = _with_split_units(stats, units, assignments)
        stats = as_column(stats, on_host)
    if len(stats):
        stats = each(lambda values: rounded(values, bits), stats)
    return GlobalNorms(
        *layout.read_checks(message),
        per_group=per_group,
        total=total,
        stats=stats,
        layer_sums=message[layout.layers],
        split_unit_coefs=split_unit_coefs,
        norm_type=layout.norm_type,
        rank_norms=message[layout.rank_norms],
    )


def counted_in_total(
    column: Column, in_total: Sequence[bool] | None, mask: Tensor | None
) -> Column:
    """The entries of groups that count in the total, 0 for the others."""
    if in_total is None or mask is None:
        return column
    if isinstance(column, Tensor):
        return torch.where(mask, column, 0.0)
    return [value if counts else 0.0 for value, counts in zip(column, in_total)]


def _with_split_units(
    stats: Column, units: UnitClipper, assignments: Sequence[PolicyAssignment]
) -> tuple[Tensor, Tensor]:
    """What units that are split over ranks add to their policies' stats, and their coefficients."""
    words = as_tensor(stats, torch.float64, units.device)
    own = len(words) - 2 * units.num_split
    coefs, table = units.combine_split(words[own:].view(2, -1))
    words = words[:own].clone()
    for assignment in assignments:
        if isinstance(assignment.policy, UnitPolicy):
            words[assignment.stats] += table[assignment.index].flatten()
    return words, coefs


def _scalar(value: Any, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value
    dtype = torch.bool if isinstance(value, bool) else torch.float64
    return torch.tensor(value, dtype=dtype, device=device)


def idle_norms(layout: MessageLayout, num_stats: int, device: torch.device) -> GlobalNorms:
    """Norms of nothing, to learn how policies answer."""
    groups: Column = [0.0] * layout.num_groups
    stats: Column = [0.0] * num_stats
    zero: Any = 0.0
    finite: Any = True
    if not layout.on_host:
        groups = torch.zeros(layout.num_groups, dtype=torch.float64, device=device)
        stats, zero = groups.new_zeros(num_stats), groups.sum()
        finite = zero == 0
    elif len(groups) > FEW:
        groups = torch.zeros(layout.num_groups, dtype=torch.float64, device=device)
    words: dict[str, Any] = dict.fromkeys(CHECK_WORDS, zero)
    return GlobalNorms(
        **words,
        agreed=finite,
        finite=finite,
        per_group=groups,
        total=zero,
        stats=stats,
        layer_sums=fill(groups[:0], 0.0),
        split_unit_coefs=None,
        norm_type=layout.norm_type,
        rank_norms=fill(groups[:0], 0.0),
    )
