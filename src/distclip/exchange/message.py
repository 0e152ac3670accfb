"""What one step's message holds, packed and unpacked.

SUM: groups' power sums · watched power sums · stats · ranks · drift · presence · count ·
nonfinite · errors · notes · tokens (3) · their squares (3)
MAX (p = inf): groups' maxima · watched maxima · stats · ranks · count · nonfinite · errors ·
notes · tokens (3) · the same, negated (3)

  stats     what policies add                 ranks      each rank's own norm, in its own place
  drift     Σ weight · power sum: 0 where replicas are equal
  presence  Σ weight · [has a gradient]: 0 where all holders of a piece have one, or none has
  count     gradients present                nonfinite  gradient tensors with inf or NaN
  errors    ranks that found something wrong  notes     ranks that have notes
  tokens    16-bit numbers, equal on all ranks

A message is a list of floats where the host reads at once, else a float64 tensor on the device: it
is packed and unpacked by the same slices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from operator import mul, neg
from typing import Any, TypeAlias

import torch
from torch import Tensor

from distclip.exchange.readback import Readback
from distclip.kernels import kernels_for
from distclip.kernels.native import WeightedSums
from distclip.kernels.step_kernels import MessagePacker
from distclip.p_norm import PNorm, bits_of, p_norm
from distclip.values import Number, same_products, select

Message: TypeAlias = "list[float] | Tensor"  # [words] float64

NUM_TOKENS = 3  # call counter, operation, last decision (and the loss scale)
_MIXER = -7046029254386353131  # odd: every bit of a scale reaches the middle of the product
# What tells whether a step may be taken, in the order in which it is read.
CHECK_WORDS = ("power_sum", "drift", "presence", "num_grads", "nonfinite", "errors", "notes")
# the weights are at least 1/8: one missing gradient shows, and rounding does not
PRESENCE_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class MessageLayout:
    """Prepared at set-up; packs and unpacks messages of one fixed length.

    Args:
        share, drift_weight: [pieces] float64; group_of: [pieces] int64, on the compute device.
        layer_of, layer_share: [parts] int64 and float64 there: parts are pieces, or rows of those
            that watched layers cut; `layer_of` is empty where none is watched.
        on_host: messages are lists of floats.
        num_rank_norms: as many as there are ranks, or 0 where they are not asked for.
    """

    norm_type: float
    num_groups: int
    num_layers: int
    num_stats: int
    num_ranks: int
    share: Tensor
    drift_weight: Tensor
    group_of: Tensor
    layer_of: Tensor
    layer_share: Tensor
    on_host: bool
    num_rank_norms: int = 0
    norm: PNorm = field(init=False)
    # where these stand in a message
    groups: slice = field(init=False)
    layers: slice = field(init=False)
    stats: slice = field(init=False)
    rank_norms: slice = field(init=False)
    checks: slice = field(init=False)
    tokens: slice = field(init=False)
    beside_tokens: slice = field(init=False)
    _share_and_weight: Tensor = field(init=False)  # [2, pieces]
    # all pieces' group sum and drift, where one group is all that they add up to; None elsewhere,
    # and on a device
    totals: WeightedSums | None = field(init=False)
    _bits: tuple[Tensor, Tensor] = field(init=False)  # 0 and 1, on the compute device
    _packer: MessagePacker | None = field(init=False)  # None: torch's operations do it

    def __post_init__(self) -> None:
        sizes = (self.num_groups, self.num_layers, self.num_stats, self.num_rank_norms)
        ends = list(accumulate(sizes))
        bits = torch.tensor([0.0, 1.0], dtype=torch.float64, device=self.share.device)
        norm, share_and_weight = (
            p_norm(self.norm_type),
            torch.stack([self.share, self.drift_weight]),
        )
        totals_alone = (
            self.on_host and self.num_groups == 1 and not self.num_layers and not norm.is_max
        )
        kernels = kernels_for((torch.float64,), self.share.device)
        totals = WeightedSums(share_and_weight, kernels == "native") if totals_alone else None
        for name, value in {
            "norm": norm,
            "groups": slice(0, ends[0]),
            "layers": slice(ends[0], ends[1]),
            "stats": slice(ends[1], ends[2]),
            "rank_norms": slice(ends[2], ends[3]),
            "checks": slice(ends[3], -2 * NUM_TOKENS),
            "tokens": slice(-2 * NUM_TOKENS, -NUM_TOKENS),
            "beside_tokens": slice(-NUM_TOKENS, None),
            "_share_and_weight": share_and_weight,
            "totals": totals,
            "_bits": tuple(bits.unbind()),
            "_packer": self._make_packer() if kernels == "triton" and not self.on_host else None,
        }.items():
            object.__setattr__(self, name, value)

    def _make_packer(self) -> MessagePacker:
        return MessagePacker(
            share=self.share,
            drift_weight=self.drift_weight,
            group_of=self.group_of,
            layer_of=self.layer_of,
            layer_share=self.layer_share,
            num_groups=self.num_groups,
            num_layers=self.num_layers,
            is_max=math.isinf(self.norm_type),
            num_words=self.num_words,
            mixer=_MIXER,
        )

    @property
    def num_words(self) -> int:
        further = self.num_stats + self.num_rank_norms
        return self.num_groups + self.num_layers + num_further_words(self.norm_type, further)

    # Packing

    def presence_words(self, mask: Tensor) -> Message:
        """Presence and count, or count alone where they are maxima.

        Args:
            mask: [pieces] float64, 1 where there is a gradient.
        """
        count = mask.sum()
        if self.norm.is_max:
            words = count.reshape(1)
        else:
            words = torch.stack([(mask * self.drift_weight).sum(), count])
        return words.tolist() if self.on_host else words

    def pack(
        self,
        power_sums: Tensor,
        stats: Tensor | None,
        presence: Message,
        found_inf: Number | None,
        has_error: bool,
        has_notes: bool,
        tokens: Sequence[Number],
        totals: WeightedSums | None = None,
        inv_scale: Number | None = None,
        part_sums: Tensor | None = None,
        rank_norms: Tensor | None = None,
        reads: bool = False,
    ) -> Message:
        """No host sync but where messages are lists, and with `reads`.

        Args:
            power_sums: [pieces] float64 power sums (maxima), 0 where there is no gradient; with
                `totals` those of its pieces.
            totals: `self.totals`, or what it selects: by which power sums add up.
            rank_norms: [ranks] float64: this rank's own norm in its place, 0 elsewhere.
            part_sums: [parts] the same of watched parts, where these are not the pieces.
            stats: [stats] float64; None is none.
            presence: of `presence_words`.
            found_inf: above 0 where something else than a piece is not finite here.
            has_error: this rank found something wrong; has_notes: it has notes that it would send.
            tokens: whole numbers below 65536; the device's are 0-dim.
            inv_scale: of the loss scale, which is mixed into the last token.
            reads: the message is not sent, and is wanted as Python's numbers. One read of a device.
        """
        start = self.layers.stop
        if rank_norms is not None:
            if self.norm.is_max:  # a maximum over ranks may lose a NaN
                rank_norms = rank_norms.nan_to_num(nan=math.inf, posinf=math.inf)
            stats = rank_norms if stats is None else torch.cat([stats, rank_norms])
        if self._packer is not None:
            assert isinstance(presence, Tensor)
            here = power_sums, part_sums, stats, presence
            words = self._packer.pack(*here, found_inf, has_error, has_notes, tokens, inv_scale)
            return Readback.read_now(words) if reads else words
        if inv_scale is not None:
            tokens = [*tokens[:-1], _mixed(tokens[-1], inv_scale)]
        if self.on_host:
            sums: list[float]
            if totals is not None:
                sums = totals.of(power_sums)
            else:
                sums = self._spread(power_sums, part_sums).tolist()
            found = 0.0 if all(map(math.isfinite, sums)) else float(_count_nonfinite(power_sums))
            found = max(found, float(found_inf or 0))
            further = [] if stats is None else stats.tolist()
            here = sums, further, presence, found
            return self._listed(*here, has_error, has_notes, tokens)
        pieces, found = self._spread(power_sums, part_sums), _count_nonfinite(power_sums)
        if found_inf is not None:
            found = torch.maximum(found, torch.as_tensor(found_inf))
        if reads:
            assert isinstance(presence, Tensor)
            stats = pieces[:0] if stats is None else stats
            parts = pieces, stats, presence, found.reshape(1)
            numbers = iter(Readback.read_now(torch.cat(parts)))
            sums, further, at_hand, (found,) = (list(islice(numbers, len(part))) for part in parts)
            return self._listed(sums, further, at_hand, found, has_error, has_notes, tokens)
        # filled in on the device: a tensor made from a list would make the host wait for it
        new = pieces.new_full
        there = [t if isinstance(t, Tensor) else new((), float(t)) for t in tokens]
        last = torch.stack([found, self._bits[has_error], self._bits[has_notes], *there])
        tokens_here = last[-NUM_TOKENS:]
        # what tells, once it is reduced, whether all tokens are the same
        beside_here = -tokens_here if self.norm.is_max else tokens_here * tokens_here
        parts = [pieces[:start], *([] if stats is None else [stats]), pieces[start:]]
        assert isinstance(presence, Tensor)
        return torch.cat([*parts, presence, last, beside_here])

    def _listed(
        self,
        sums: list[float],
        further: list[float],
        presence: Message,
        found: float,
        has_error: bool,
        has_notes: bool,
        tokens: Sequence[Any],
    ) -> list[float]:
        """A message of Python's numbers."""
        start = self.layers.stop
        checks: list[Any] = [*presence, found, float(has_error), float(has_notes)]
        beside = map(neg, tokens) if self.norm.is_max else map(mul, tokens, tokens)
        return [*sums[:start], *further, *sums[start:], *checks, *tokens, *beside]

    def _spread(self, power_sums: Tensor, part_sums: Tensor | None) -> Tensor:
        """[groups + layers, and drift where they are sums]: what pieces add up to.

        A maximum over ranks may lose a NaN: it is sent as inf. An inf or NaN makes drift
        meaningless; such a step is not judged by it.
        """
        if self.num_groups == 1 and not self.num_layers and not self.norm.is_max:
            return torch.mv(self._share_and_weight, power_sums)
        reduce = "amax" if self.norm.is_max else "sum"
        pieces = self._addends(power_sums, self.share)
        parts = pieces if part_sums is None else self._addends(part_sums, self.layer_share)
        out: list[Tensor] = []
        for count, index, values in (
            (self.num_groups, self.group_of, pieces),
            (self.num_layers, self.layer_of, parts),
        ):
            if count == 1 and len(values):
                out.append((values.amax() if self.norm.is_max else values.sum()).reshape(1))
            elif count:
                zeros = torch.zeros(count, dtype=torch.float64, device=values.device)
                out.append(zeros.scatter_reduce_(0, index, values, reduce))
        if not self.norm.is_max:
            out.append((power_sums * self.drift_weight).sum().reshape(1))
        return torch.cat(out)

    def _addends(self, power_sums: Tensor, share: Tensor) -> Tensor:
        if self.norm.is_max:
            return power_sums.nan_to_num(nan=math.inf, posinf=math.inf)
        return power_sums * share

    # Unpacking

    def read_checks(self, message: Message) -> tuple[Any, ...]:
        """Of a reduced message what tells whether its step may be taken: CHECK_WORDS, whether ranks
        agree, and whether all is finite."""
        leading = [0.0, 0.0] if self.norm.is_max else []
        tokens, beside = message[self.tokens], message[self.beside_tokens]
        if self.num_ranks == 1:
            agreed = True
        elif self.norm.is_max:
            agreed = same_products(tokens, 1.0, beside, -1.0)
        else:  # all are equal iff W Σv² = (Σv)²: whole numbers, rounded once at most
            agreed = same_products(tokens, tokens, beside, float(self.num_ranks))
        sums = message[self.groups]
        power_sum = sums[0] if self.num_groups == 1 else self.norm.combine(sums)
        if self.norm_type < 1:  # it may be finite where the norm, its p-th root, is not
            root = self.norm.finish(power_sum)
            power_sum = select(root - root == 0, power_sum, math.inf)
        drift, presence, num_grads, nonfinite, errors, notes = (*leading, *message[self.checks])
        # x - x is 0 but for inf and NaN, and the count is to be 0 too
        finite = power_sum - power_sum == nonfinite
        return power_sum, drift, presence, num_grads, nonfinite, errors, notes, agreed, finite


def _mixed(token: Any, inv_scale: Any) -> Any:
    """16 bits that depend on both."""
    on_device = isinstance(inv_scale, Tensor)
    bits = inv_scale.view(torch.int64) if on_device else bits_of([inv_scale])[0]
    return (token + (bits * _MIXER >> 40 & 0xFFFF)) % 0x10000


def num_further_words(norm_type: float, num_stats: int) -> int:
    """Words of the message beside one for each group and watched layer."""
    return num_stats + (4 if math.isinf(norm_type) else 6) + 2 * NUM_TOKENS


def _count_nonfinite(power_sums: Tensor) -> Tensor:
    """[] float64: how many are not finite. No host sync."""
    zero = power_sums - power_sums  # NaN where an inf or NaN is: fewer operations than isfinite
    return zero.ne(zero).sum(dtype=torch.float64)
