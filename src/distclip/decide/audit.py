"""The failure path: who differs from whom, by name. Talks more than a step may, and only when
something is wrong or on demand."""

from __future__ import annotations

import math
from bisect import bisect
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distclip.errors import AgreementError, GradientError
from distclip.exchange.channel import Channel, first_rank, format_ranks, lines_by_rank
from distclip.records import Culprit
from distclip.setup.inventory import DECLARE
from distclip.setup.plan import Plan

NAMED = 10  # parameters or culprits that a report names
_FITS = 1e140  # elements below it are squared and added up without an overflow

_REMEDY = (
    "If gradients were not reduced (no DistributedDataParallel or fully_shard around the model; "
    "no_sync, accumulation), wrap it, or clip after the reduction. Parameters that were added or "
    "unfrozen after DistributedDataParallel was built are not reduced by it: wrap the model anew, "
    "and call clipper.rebuild(). An optimizer "
    "that reduces gradients inside its step() comes too late: reduce them before the clip. "
    f"{DECLARE}. If ranks train apart on purpose (local SGD, DiLoCo), give "
    "process_group=: the ranks that reduce their gradients together, or distclip.LOCAL. Else one "
    "replica has diverged: restore it from a checkpoint or another rank; with a GradScaler, "
    "every clip must be given it: clip_(optimizer, scaler)"
)


class GradFingerprint(NamedTuple):
    """Numbers that equal gradients share."""

    square: float  # of the elements that are finite: their sum of squares
    # of these the signed squares, weighted by position: permuted and negated copies differ in it
    signed: float = 0.0
    # of the others (NaN, inf, -inf) their kinds, weighted likewise; 0 where all are finite
    nonfinite: float = 0.0


Prints = Mapping[int, GradFingerprint]  # by piece


def compare_replicas(
    channel: Channel,
    plan: Plan,
    prints: Prints,
    tolerance: float,
    step: int,
    device: torch.device,
    things: str = "gradients",
    misplaced: Collection[int] = (),
) -> None:
    """A collective: AgreementError on all ranks if copies of a gradient (or parameter) differ,
    naming up to ten with their ranks.

    Args:
        prints: of this rank's gradients; of their norms alone where the gradients are gone already.
        tolerance: relative, of each parameter's sum of squares.
        misplaced: pieces whose gradients are placed otherwise than their parameters: these, and
            what other ranks hold of them, are no copies piece by piece, and are not compared.
    """
    worst = _largest_differences(channel, plan, prints, tolerance, device, misplaced)
    if not worst:
        return
    lines = []
    for i, slot in enumerate(plan.slot_of):
        if slot in worst and plan.shares[i].num_replicas > 1:
            piece = plan.pieces[i]
            norm, signed = "no gradient", ""
            if i in prints:
                square, signed_sum, nonfinite = prints[i]
                norm, signed = f"norm {math.sqrt(square):.9g}", f"{signed_sum:.9g}"
                if nonfinite:
                    norm += " beside inf or NaN"
                    signed += f" and {nonfinite:.9g} of inf and NaN"
            lines.append(f"{piece.key_name}\t{slot}\t{piece.holding.region}\t{norm}\t{signed}")
    copies: dict[tuple[str, int, str], dict[tuple[str, str], list[int]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for rank, text in zip(
        channel.ranks, channel.gather_texts("\n".join(lines), device, "the audit"), strict=True
    ):
        for line in text.splitlines():
            name, slot, region, norm, signed = line.split("\t")
            copies[name, int(slot), region][norm, signed].append(rank)
    # a parameter's other parts may be equal
    apart = {part: seen for part, seen in copies.items() if len(seen) > 1} or copies
    said = [f"{name}: {_sides(seen)}" for (name, _, _), seen in sorted(apart.items())]
    text = f"step {step}: {things} that should be copies are not equal:"
    raise channel.tell_once(AgreementError("\n".join([text, *said, _REMEDY])))


def _sides(seen: Mapping[tuple[str, str], list[int]]) -> str:
    """Which ranks hold what: norms, and where these are equal what tells the copies apart."""
    by_norm: dict[str, list[int]] = defaultdict(list)
    for (norm, _), ranks in seen.items():
        by_norm[norm] += ranks
    if len(by_norm) == 1 < len(seen):
        return ", ".join(
            f"{norm} with signed sum {signed} on rank {format_ranks(ranks)}"
            for (norm, signed), ranks in seen.items()
        )
    return ", ".join(f"{norm} on rank {format_ranks(ranks)}" for norm, ranks in by_norm.items())


def _largest_differences(
    channel: Channel,
    plan: Plan,
    prints: Prints,
    tolerance: float,
    device: torch.device,
    misplaced: Collection[int],
) -> set[int]:
    """Slots of up to ten parameters whose copies differ most. One all-reduce of seven numbers a
    parameter."""
    table = torch.zeros(7, plan.slots, dtype=torch.float64, device="cpu")
    for i in misplaced:
        table[6, plan.slot_of[i]] += 1
    for i, (slot, share) in enumerate(zip(plan.slot_of, plan.shares, strict=True)):
        if i in prints:
            square, signed, nonfinite = prints[i]
            weighted = torch.tensor(
                [square, signed, nonfinite, 1.0], dtype=torch.float64, device="cpu"
            )
            table[:4, slot] += share.drift_weight * weighted
            table[4, slot] += square / share.num_replicas
            table[5, slot] += nonfinite / share.num_replicas
    table = channel.all_reduce_(
        table.to(channel.comm_device(device)), "sum", "the audit's comparison"
    ).cpu()
    off = torch.maximum(table[0].abs(), table[1].abs()) / table[4].clamp(min=1e-300)
    off = torch.maximum(off, table[2].abs() / table[5].clamp(min=1e-300))
    off = torch.where(table[3].abs() > 1e-6, torch.inf, off.nan_to_num(nan=torch.inf))
    off = torch.where(table[6] > 0, 0.0, off)
    return {int(i) for i in off.argsort(descending=True)[:NAMED] if off[i] > tolerance}


def fingerprint_of(grad: Tensor) -> GradFingerprint:
    """Reads on the host."""
    grad = grad.to_dense() if grad.is_sparse else grad
    grad = torch.view_as_real(grad) if grad.is_complex() else grad
    square = signed = nonfinite = torch.zeros((), dtype=torch.float64, device=grad.device)
    for start, chunk in enumerate(grad.reshape(-1).split(1 << 20)):
        x = chunk.double()
        place = torch.arange(x.numel(), device=x.device, dtype=torch.int64) + start * 7919
        weight = 0.5 + (place * 2654435761 % 65521) / 65521
        # a sum of these could not be compared: each kind by a number of its own
        kind = torch.where(x > 0, 1.0, torch.where(x < 0, 2.0, 3.0))
        fits = x.abs() < _FITS
        nonfinite = nonfinite + torch.where(fits, 0.0, kind * weight).sum()
        x = torch.where(fits, x, 0.0)
        square = square + x.square().sum()
        signed = signed + (x.abs() * x * weight).sum()
    return GradFingerprint(float(square), float(signed), float(nonfinite))


def gather_culprits(
    channel: Channel,
    plan: Plan,
    sums: Sequence[float],
    present: Sequence[float],
    device: torch.device,
) -> tuple[Culprit, ...]:
    """A collective: up to ten gradient tensors that are not finite, in turn from each rank that has
    some, with their finite neighbours.

    Args:
        sums: [pieces] this rank's power sums; present: 0 where there is no gradient.
    """
    names = [piece.name for piece in plan.pieces]
    bad = [i for i, s in enumerate(sums) if not math.isfinite(s)][:NAMED]
    finite = [i for i, s in enumerate(sums) if present[i] and math.isfinite(s)] if bad else []
    lines: list[str] = []
    for i in bad:
        at = bisect(finite, i)
        before = "".join(names[k] for k in finite[max(0, at - 1) : at])
        after = "".join(names[k] for k in finite[at : at + 1])
        lines.append(f"{names[i]}\t{'NaN' if math.isnan(sums[i]) else 'inf'}\t{before}\t{after}")
    found: list[tuple[int, Culprit]] = []
    for rank, text in zip(
        channel.ranks,
        channel.gather_texts("\n".join(lines), device, "the search for culprits"),
        strict=True,
    ):
        for i, line in enumerate(text.splitlines()):
            name, kind, before, after = line.split("\t")
            culprit = Culprit(
                parameter=name, rank=rank, kind=kind, before=before or None, after=after or None
            )
            found.append((i, culprit))
    found.sort(key=lambda each: (each[0], each[1][:3]))
    return tuple(culprit for _, culprit in found[:NAMED])


def disagreement_error(channel: Channel, doing: str, device: torch.device) -> AgreementError:
    """A collective: the error that says which rank did what."""
    said = channel.gather_lines([doing], device, "the comparison of calls")
    text = (
        "ranks did not do the same; every rank must make the same calls of the clipper in the same "
        "order, and decide alike:"
    )
    return channel.tell_once(AgreementError("\n".join([text, *lines_by_rank(said)])))


def gradient_error(
    channel: Channel, step: int, errors: Sequence[str], device: torch.device
) -> GradientError:
    """A collective: the error that says what each rank found wrong, one line each."""
    said = channel.gather_lines("\n".join(errors).splitlines(), device, "the report of faults")
    text = "\n".join(lines_by_rank(said))
    return channel.tell_once(GradientError(f"step {step}: {text}"), first_rank(said))
