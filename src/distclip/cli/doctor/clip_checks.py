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
from distclip.cli.doctor.layouts import DoctorLayout, LayoutCase, stages_case
from distclip.cli.doctor.records import (
    CheckContext,
    CheckResult,
    Observation,
    name_ranks,
    ranks_by_value,
)
from distclip.testing import count_collectives

TOLERANCE = 1e-6  # relative, of a float32 norm
NORM_TYPES = (2.0, math.inf)
REPORT_FAULT = (
    "a fault of distclip or of this torch: report it with the output of `distclip doctor "
    "--json`, and do not train in this layout"
)


@dataclass(frozen=True, slots=True)
class LayoutCheck:
    """Norms with p = 2 and inf against float64, bit-equal on all ranks, by one all-reduce;
    gradients multiplied by the coefficient."""

    layout: DoctorLayout

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def line(self) -> str:
        return self.layout.line

    def unmet_requirement(self, size: int) -> str:
        if size >= self.layout.ranks and not (self.layout.even and size % 2):
            return ""
        number = f"at least {self.layout.ranks} ranks" + ", an even number" * self.layout.even
        return f"needs {number}; there {_size_text(size)}"

    def run(self, context: CheckContext) -> Observation:
        context.begin_stage("wrap, forward and backward", self.layout.sends)
        case = self.layout.build(context)
        return {f"{p:g}": _clip_and_compare(case, p, context) for p in NORM_TYPES}

    def judge(self, observations: Sequence[Observation]) -> CheckResult:
        faults: list[str] = []
        worst = 0.0
        expected = ["allreduce_"] if len(observations) > 1 else []
        for p in observations[0]:
            rows = [one[p] for one in observations]
            wrong = [
                rank
                for rank, row in enumerate(rows)
                if not abs(row["norm"] - row["want"]) <= TOLERANCE * row["want"]
            ]
            worst = max(worst, *(abs(row["norm"] / row["want"] - 1) for row in rows))
            if wrong:
                row = rows[wrong[0]]
                faults.append(
                    f"the norm with p = {p} is {row['norm']:.9g} on {name_ranks(wrong)}, the "
                    f"oracle's {row['want']:.9g}"
                )
            for what in ("norm bits", "coefficient bits"):
                found = ranks_by_value([row[what] for row in rows])
                if len(found) > 1:
                    faults.append(
                        f"{what} with p = {p}: "
                        + ", ".join(
                            f"{bits} on {name_ranks(ranks)}" for bits, ranks in found.items()
                        )
                    )
            talkers = [rank for rank, row in enumerate(rows) if row["collectives"] != expected]
            if talkers:
                faults.append(
                    f"{name_ranks(talkers)} sent {rows[talkers[0]]['collectives']} with p = "
                    f"{p}, not {expected}"
                )
            unscaled = [
                rank for rank, row in enumerate(rows) if not row["gradient error"] <= TOLERANCE
            ]
            if unscaled:
                faults.append(
                    f"gradients on {name_ranks(unscaled)} are not coefficient × before, with "
                    f"p = {p}"
                )
        if faults:
            return CheckResult(self.name, "fail", "; ".join(faults), REPORT_FAULT)
        sent = (
            f"equal bits on {len(observations)} ranks, 1 all_reduce"
            if len(observations) > 1
            else "no collective"
        )
        return CheckResult(
            self.name, "pass", f"norms with p = 2 and inf right to {max(worst, 1e-16):.0e}, {sent}"
        )


def _size_text(size: int) -> str:
    return "is 1" if size == 1 else f"are {size}"


def _local_tensor(tensor: Tensor) -> Tensor:
    return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor


def _clip_and_compare(case: LayoutCase, p: float, context: CheckContext) -> Observation:
    """Clip to half of the oracle's norm, compare, and restore the gradients."""
    flat = torch.cat([grad.flatten() for grad in case.want])
    want = float(flat.abs().max() if math.isinf(p) else flat.square().sum().sqrt())
    context.begin_stage(f"GradClipper set-up with p = {p:g}", "all_reduce")
    clipper = distclip.GradClipper(case.params, want / 2, norm_type=p, **case.options)
    grads = [_local_tensor(param.grad) for param in case.own if param.grad is not None]
    before = [grad.clone() for grad in grads]
    context.begin_stage(f"clip_ with p = {p:g}", f"all_reduce of {clipper.plan.words} float64")
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
class OverflowCheck:
    """An inf on one rank: no rank takes the step, the culprit is named; the next, finite step is
    taken on all."""

    name: str = "overflow"
    line: str = (
        "an inf in one rank's gradients: the step is skipped on all ranks, and the culprit named"
    )

    def unmet_requirement(self, size: int) -> str:
        return ""

    def run(self, context: CheckContext) -> Observation:
        case = stages_case(context)
        context.begin_stage("GradClipper set-up", "all_reduce")
        clipper = distclip.GradClipper(case.params, 1.0, **case.options)
        optimizer = torch.optim.SGD(case.own, lr=0.1, momentum=0.9, weight_decay=0.1)
        start = [param.detach().clone() for param in case.own]
        grads = [param.grad.clone() for param in case.own if param.grad is not None]
        if context.rank == context.size - 1 and case.own[0].grad is not None:
            case.own[0].grad[0, 0] = math.inf
        context.begin_stage(
            "step with an inf",
            f"all_reduce of {clipper.plan.words} float64, and those that name the culprit",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the skipped step, which is intended
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
        context.begin_stage("the step after", f"all_reduce of {clipper.plan.words} float64")
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

    def judge(self, observations: Sequence[Observation]) -> CheckResult:
        last = len(observations) - 1
        faults = [
            f"{text} on {name_ranks(ranks)}"
            for text, ranks in (
                (
                    "the step was not reported as skipped",
                    [r for r, one in enumerate(observations) if not one["skipped"]],
                ),
                (
                    "parameters or optimizer state changed",
                    [r for r, one in enumerate(observations) if one["moved"]],
                ),
                (
                    "the good step after it moved nothing",
                    [r for r, one in enumerate(observations) if not one["moves after"]],
                ),
                (
                    f"the culprit on rank {last} was not named",
                    [r for r, one in enumerate(observations) if one["ranks"] != [last]],
                ),
            )
            if ranks
        ]
        if faults:
            return CheckResult(self.name, "fail", "; ".join(faults), REPORT_FAULT)
        return CheckResult(
            self.name,
            "pass",
            f"an inf on rank {last}: skipped on every rank, nothing moved, culprit named",
        )
