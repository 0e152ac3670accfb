"""A step's numbers on a CUDA device, between the sums and the optimizers: three launches, where
torch's operations are fifty. Triton is optional, and imported on use.

These know arrays and numbers alone. What they write are the bits that torch's operations in
`exchange/message.py`, `decide/` and `policies/fixed.py` give, but for the order in which sums are
added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distclip.kernels.triton_launch import launcher_for

_FLAGS = 6  # of `decide_fixed`, beside one for each group
_NUMBERS = 16  # of its vector, beside groups and ranks


class _StepProgram:
    """One of `step_programs`, on one device, for so many numbers side by side."""

    def __init__(self, name: str, device: torch.device, count: int, programs: int = 1) -> None:
        import distclip.kernels.step_programs as source

        self._name, self._device, self._grid = name, device, (programs, 1)
        self._lanes, self._warps = source.FEW if count <= source.FEW[0] else source.MANY

    def run(self, args: tuple[Any, ...], constants: tuple[Any, ...]) -> None:
        import distclip.kernels.step_programs as source

        program, constants = getattr(source, self._name), (*constants, self._lanes)
        launcher_for(self._device).run(program, self._warps, self._grid, args, constants)


class MessagePacker:
    """This rank's message in one launch. Prepared at set-up, where it is compiled.

    Args:
        share, drift_weight: [pieces] float64, of which device.
        group_of: [pieces], layer_of: [parts]: whose sum each is part of.
        layer_share: [parts] float64.
        num_groups, num_layers: of these sums.
        is_max: maxima, of which neither shares nor drift matter.
        num_words: of the message.
        mixer: by which a loss scale's bits are mixed into the last token.
    """

    def __init__(
        self,
        share: Tensor,
        drift_weight: Tensor,
        group_of: Tensor,
        layer_of: Tensor,
        layer_share: Tensor,
        num_groups: int,
        num_layers: int,
        is_max: bool,
        num_words: int,
        mixer: int,
    ) -> None:
        device = share.device
        # which addends make up each sum, and where they begin: no atomics, and always one order
        columns = [(group_of, share, num_groups), (layer_of, layer_share, num_layers)]
        orders, weights, firsts, start = [], [], [], 0
        for owners, each, count in columns[: 1 + bool(num_layers)]:
            owner, order = owners.cpu().sort(stable=True)
            orders.append(order.to(torch.int32))
            weights.append(each.cpu()[order])
            firsts.append(start + torch.searchsorted(owner, torch.arange(count, device="cpu")))
            start += len(owner)
        firsts.append(torch.full((1,), start, device="cpu"))
        tables = torch.cat(orders), torch.cat(weights), torch.cat(firsts).to(torch.int32)
        self._order, self._weights, self._firsts = (table.to(device) for table in tables)
        self._drift_weight = drift_weight
        self._nothing = torch.zeros(2, dtype=torch.float64, device=device)
        self._num_words, self._pieces = num_words, share.numel()
        self._sums, self._constants = (num_groups, num_layers), (is_max, mixer)
        sums = num_groups + num_layers
        self._program = _StepProgram("pack_words", device, start, sums + 1)
        self._further = num_words - sums - (10 if is_max else 12)
        self._parts = layer_share.numel() if num_layers else self._pieces
        # compiled here: a first launch may come in a capture
        further = share.new_zeros(self._further)
        self.pack(share, layer_share, further, self._nothing, None, False, False, [0, 0, 0])

    def pack(
        self,
        power_sums: Tensor,
        part_sums: Tensor | None,
        further: Tensor | None,
        presence: Tensor,
        found_inf: Any,
        has_error: bool,
        has_notes: bool,
        tokens: Sequence[Any],
        inv_scale: Any = None,
    ) -> Tensor:
        """As `MessageLayout.pack` on a device. No host sync.

        Args:
            part_sums: None where parts are the pieces.
            further: [words of policies and ranks] float64; None where the message has none.
        """
        # what is left out is not read: else it would be memory of others
        assert further is not None or not self._further
        assert part_sums is not None or self._parts == self._pieces
        words = power_sums.new_empty(self._num_words)
        step, call, last = tokens
        on_device = isinstance(last, Tensor)
        nothing = self._nothing
        args = (
            power_sums,
            power_sums if part_sums is None else part_sums,
            self._order,
            self._weights,
            self._drift_weight,
            self._firsts,
            nothing if further is None else further,
            presence,
            nothing if found_inf is None else self._on_device(found_inf),
            last if on_device else nothing,
            nothing if inv_scale is None else self._on_device(inv_scale),
            words,
            self._pieces,
            self._further,
            int(has_error),
            int(has_notes),
            int(step),
            int(call),
            -1 if on_device else int(last),
            int(inv_scale is not None),
            *self._sums,
        )
        self._program.run(args, self._constants)
        return words

    def _on_device(self, number: Any) -> Tensor:
        if isinstance(number, Tensor):
            return number.to(self._nothing.device, torch.float64)
        return torch.full((), float(number), dtype=torch.float64, device=self._nothing.device)


class FixedStep(NamedTuple):
    """What becomes of a step with constant thresholds, all on the device."""

    words: list[Tensor]  # [7] check words, each [] float64
    total: Tensor  # [] float64
    norms: Tensor  # [groups] float64, as are these
    norms_after: Tensor
    coefs: Tensor
    applied: Tensor  # coefficients, 1 where the step is not finite
    flags: list[Tensor]  # [6] agreed, finite, ok, found_inf, skipped, clipped; each [] bool
    clipped: Tensor  # [groups] bool
    stop: Tensor  # [] float32: 1 where the step is not taken
    # [groups] float32 each, what optimizers divide by: 1 / applied, and 1 / (applied * inv_scale)
    divisors: tuple[Tensor, Tensor]
    vector: Tensor  # float64: what the host reads


class FixedDecider:
    """The decision by constant thresholds, in one launch. Prepared at set-up, where it is compiled.

    Args:
        thresholds: [groups] float64, on the device.
        in_total: [groups] bool there: which groups count in the total; None where all do.
        num_words: of the message, in which nothing stands of policies.
        num_layers, num_rank_norms: words of it.
        num_ranks: who sent.
        is_max, is_square: the norm, of p = inf, 2 or else 1.
        rounding: what `p_norm.rounded` works with.
        propagates: whatever is wrong, the step is taken.
        drift_tolerance: None: drift is not judged.
        presence_tolerance: of presence.
    """

    def __init__(
        self,
        thresholds: Tensor,
        in_total: Tensor | None,
        num_layers: int,
        num_rank_norms: int,
        num_ranks: int,
        is_max: bool,
        is_square: bool,
        rounding: tuple[float, int, int, int, int],
        propagates: bool,
        drift_tolerance: float | None,
        presence_tolerance: float,
        num_words: int,
    ) -> None:
        self.thresholds = thresholds
        device, groups = thresholds.device, thresholds.numel()
        if in_total is None:
            in_total = torch.ones(groups, dtype=torch.bool, device=device)
        self._in_total = in_total.view(torch.uint8)
        self._one = torch.ones((), dtype=torch.float64, device=device)
        self._vector_size = _NUMBERS + groups + num_rank_norms
        self._sizes = (groups, num_layers, num_rank_norms, num_ranks)
        self._constants = (
            is_max, is_square, propagates,
            -1.0 if drift_tolerance is None else drift_tolerance, presence_tolerance, *rounding,
        )  # fmt: skip
        self._program = _StepProgram("decide_fixed", device, groups)
        # compiled here: a first launch may come in a capture
        self.decide(thresholds.new_zeros(num_words), self._one, None, False, False)

    def decide(
        self,
        words: Tensor,
        clip_rate: Tensor,
        inv_scale: Tensor | None,
        read_only: bool,
        late: bool,
    ) -> FixedStep:
        """Of a reduced message. No host sync.

        Args:
            clip_rate: [] float64, of the steps before.
            inv_scale: [] float64, of the loss scale.
            late: whatever is wrong is judged by the device, not only what is not finite.
        """
        thresholds, groups = self.thresholds, self.thresholds.numel()
        vector = thresholds.new_empty(self._vector_size)
        columns = thresholds.new_empty(3, groups)
        flags = self._in_total.new_empty(_FLAGS + groups)
        for_optimizers = thresholds.new_empty(1 + 2 * groups, dtype=torch.float32)
        args = (
            words, thresholds, self._in_total, clip_rate,
            self._one if inv_scale is None else inv_scale,
            vector, columns, flags, for_optimizers, int(read_only), int(late), *self._sizes,
        )  # fmt: skip
        self._program.run(args, self._constants)
        numbers, coefs = vector[:_NUMBERS], vector[_NUMBERS : _NUMBERS + groups]
        *words_and_total, _, _, _, _, _, _, _, _ = numbers.unbind()
        norms, after, applied = columns.unbind()
        flags = flags.view(torch.bool)
        stop, divisors, scaled_divisors = for_optimizers.split_with_sizes([1, groups, groups])
        return FixedStep(
            words=words_and_total[:7],
            total=words_and_total[7],
            norms=norms,
            norms_after=after,
            coefs=coefs,
            applied=applied,
            flags=list(flags[:_FLAGS].unbind()),
            clipped=flags[_FLAGS:],
            stop=stop.reshape(()),
            divisors=(divisors, scaled_divisors),
            vector=vector,
        )


class StepRecorder:
    """The counters' next values in one launch. Prepared at set-up, where it is compiled.

    Args:
        weights: [2, groups] int64: of the decision's hash; None where there is nobody who would
            compare it.
        window: steps that the clip rate counts.
    """

    def __init__(self, weights: Tensor | None, window: int, device: torch.device) -> None:
        def new(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        groups = 0 if weights is None else weights.shape[1]
        self._weights = new((1,), torch.int64) if weights is None else weights
        self._groups, self._constants = groups, (window, weights is not None)
        self._program = _StepProgram("record_step", device, groups)
        # compiled here: a first launch may come in a capture
        number, column = new(()), new((groups,))
        flag, count = new((), torch.bool), new((), torch.int64)
        counters, ring = (count, count, number, number), new((window,), torch.bool)
        self.record((flag, flag), (column, column), counters, ring, number)

    def record(
        self,
        flags: tuple[Tensor, Tensor],
        columns: tuple[Tensor, Tensor],
        counters: tuple[Tensor, Tensor, Tensor, Tensor],
        ring: Tensor,
        last_hash: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Writes to counters, ring and last_hash. No host sync.

        Args:
            flags: whether the step was clipped, and skipped; [] bool.
            columns: coefficients and thresholds; [groups] float64.
            counters: calls and skips, [] int64; how many of the window were clipped, and the share
                of them, [] float64.
            ring: [window] bool.
            last_hash: [] float64.

        Returns:
            The clip rate and the skips, [] float64, of this step: no later one writes to them.
        """
        told = last_hash.new_empty(2)
        clipped, skipped = (flag.view(torch.uint8) for flag in flags)
        # a policy of the user's may answer otherwise than at set-up; as a rule these do nothing
        coefs, thresholds = (column.double().contiguous() for column in columns)
        args = (clipped, skipped, coefs, thresholds, self._weights, *counters)
        self._program.run(
            (*args, ring.view(torch.uint8), last_hash, told, self._groups), self._constants
        )
        rate, skips = told.unbind()
        return rate, skips
