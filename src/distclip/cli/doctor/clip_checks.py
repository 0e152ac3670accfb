"""The checks of a clip: every layout against the oracle, and an overflow on one rank."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

import distclip
from distclip.cli.doctor.layouts import Case, Layout, stages
from distclip.cli.doctor.records import CheckContext, Observation, Result, by_value, spans
from distclip.testing import count_collectives

TOLERANCE = 1e-6  # relative, of a float32 norm
NORMS = (2.0, math.inf)
REPORT = (
    "a fault of distclip or of this torch: report it with the output of `distclip doctor "
    "--json`, and do not train in this layout"
)


@dataclass(frozen=True, slots=True)
class LayoutCheck:
    """Norm with p = 2 and inf against float64, equal bits on all ranks, one all-reduce, and
    gradients = coefficient × before."""

    layout: Layout

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def line(self) -> str:
        return self.layout.line

    def lacks(self, size: int) -> str:
        if size >= self.layout.ranks and not (self.layout.even and size % 2):
            return ""
        number = f"at least {self.layout.ranks} ranks" + ", an even number" * self.layout.even
        return f"needs {number}; there {_are(size)}"

    def run(self, bench: CheckContext) -> Observation:
        bench.stage("wrap, forward and backward", self.layout.sends)
        case = self.layout.build(bench)
        return {f"{p:g}": _clip(case, p, bench) for p in NORMS}

    def judge(self, seen: Sequence[Observation]) -> Result:
        faults: list[str] = []
        worst = 0.0
        expected = ["allreduce_"] if len(seen) > 1 else []
        for p in seen[0]:
            rows = [one[p] for one in seen]
            wrong = [
                rank
                for rank, row in enumerate(rows)
                if not abs(row["norm"] - row["want"]) <= TOLERANCE * row["want"]
            ]
            worst = max(worst, *(abs(row["norm"] / row["want"] - 1) for row in rows))
            if wrong:
                row = rows[wrong[0]]
                faults.append(
                    f"the norm with p = {p} is {row['norm']:.9g} on {spans(wrong)}, the "
                    f"oracle's {row['want']:.9g}"
                )
            for what in ("norm bits", "coefficient bits"):
                found = by_value([row[what] for row in rows])
                if len(found) > 1:
                    faults.append(
                        f"{what} with p = {p}: "
                        + ", ".join(f"{bits} on {spans(ranks)}" for bits, ranks in found.items())
                    )
            talkers = [rank for rank, row in enumerate(rows) if row["collectives"] != expected]
            if talkers:
                faults.append(
                    f"{spans(talkers)} sent {rows[talkers[0]]['collectives']} with p = "
                    f"{p}, not {expected}"
                )
            unscaled = [
                rank for rank, row in enumerate(rows) if not row["gradient error"] <= TOLERANCE
            ]
            if unscaled:
                faults.append(
                    f"gradients on {spans(unscaled)} are not coefficient × before, with p = {p}"
                )
        if faults:
            return Result(self.name, "fail", "; ".join(faults), REPORT)
        sent = (
            f"equal bits on {len(seen)} ranks, 1 all_reduce" if len(seen) > 1 else "no collective"
        )
        return Result(
            self.name, "pass", f"norms with p = 2 and inf right to {max(worst, 1e-16):.0e}, {sent}"
        )


def _are(size: int) -> str:
    return "is 1" if size == 1 else f"are {size}"


def _local(tensor: Tensor) -> Tensor:
    return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor


def _clip(case: Case, p: float, bench: CheckContext) -> Observation:
    """Clip at half of the oracle's norm, look, and put the gradients back."""
    flat = torch.cat([grad.flatten() for grad in case.want])
    want = float(flat.abs().max() if math.isinf(p) else flat.square().sum().sqrt())
    bench.stage(f"GradClipper set-up with p = {p:g}", "all_reduce")
    clipper = distclip.GradClipper(case.params, want / 2, norm_type=p, **case.options)
    grads = [_local(param.grad) for param in case.own if param.grad is not None]
    before = [grad.clone() for grad in grads]
    bench.stage(f"clip_ with p = {p:g}", f"all_reduce of {clipper.plan.words} float64")
    with count_collectives() as sent:
        report = clipper.clip_()
    norm, coef = float(report.total_norm), float(report.clip_coef)
    errors = [
        ((g.double() - 0.5 * b.double()).abs().max() / want).item()
        for g, b in zip(grads, before, strict=True)
        if g.numel()
    ]
    for grad, old in zip(grads, before, strict=True):
        grad.copy_(old)
    return {
        "want": want,
        "norm": norm,
        "norm bits": norm.hex(),
        "coefficient bits": coef.hex(),
        "gradient error": max(errors, default=0.0),
        "collectives": sent.names,
    }


@dataclass(frozen=True, slots=True)
class Overflow:
    """An inf on one rank: no rank moves, the culprit is named; at the next, good step all move."""

    name: str = "overflow"
    line: str = (
        "an inf in one rank's gradients: the step is skipped on all ranks, and the culprit named"
    )

    def lacks(self, size: int) -> str:
        return ""

    def run(self, bench: CheckContext) -> Observation:
        case = stages(bench)
        bench.stage("GradClipper set-up", "all_reduce")
        clipper = distclip.GradClipper(case.params, 1.0, **case.options)
        optimizer = torch.optim.SGD(case.own, lr=0.1, momentum=0.9, weight_decay=0.1)
        start = [param.detach().clone() for param in case.own]
        grads = [param.grad.clone() for param in case.own if param.grad is not None]
        if bench.rank == bench.size - 1 and case.own[0].grad is not None:
            case.own[0].grad[0, 0] = math.inf
        bench.stage(
            "step with an inf",
            f"all_reduce of {clipper.plan.words} float64, and those that name the culprit",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the skipped step, which is meant
            report = clipper.step(optimizer)
        skipped, culprits = (
            bool(report.skipped.item()),
            [str(culprit) for culprit in report.culprits],
        )
        moved = any(
            not torch.equal(param, old) for param, old in zip(case.own, start, strict=True)
        ) or bool(optimizer.state)
        for param, grad in zip(case.own, grads, strict=True):
            param.grad = grad
        bench.stage("the step after", f"all_reduce of {clipper.plan.words} float64")
        clipper.step(optimizer)
        after = all(not torch.equal(param, old) for param, old in zip(case.own, start, strict=True))
        ranks = [culprit.rank for culprit in report.culprits]
        return {
            "skipped": skipped,
            "moved": moved,
            "moves after": after,
            "culprits": culprits,
            "ranks": ranks,
        }

    def judge(self, seen: Sequence[Observation]) -> Result:
        last = len(seen) - 1
        faults = [
            f"{text} on {spans(ranks)}"
            for text, ranks in (
                (
                    "the step was not reported as skipped",
                    [r for r, one in enumerate(seen) if not one["skipped"]],
                ),
                (
                    "parameters or optimizer state changed",
                    [r for r, one in enumerate(seen) if one["moved"]],
                ),
                (
                    "the good step after it moved nothing",
                    [r for r, one in enumerate(seen) if not one["moves after"]],
                ),
                (
                    f"the culprit on rank {last} was not named",
                    [r for r, one in enumerate(seen) if one["ranks"] != [last]],
                ),
            )
            if ranks
        ]
        if faults:
            return Result(self.name, "fail", "; ".join(faults), REPORT)
        return Result(
            self.name,
            "pass",
            f"an inf on rank {last}: skipped on every rank, nothing moved, culprit named",
        )
