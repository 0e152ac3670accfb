"""`GradClipper`: wires the stages. It reads top to bottom like the picture in the README, and owns every buffer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from distclip import apply, audit
from distclip.agreement import key
from distclip.collecting import GradOf, Grads, collect, own_grad
from distclip.deciding import decide, describe_rules, in_total, kept, split
from distclip.errors import AgreementError, ConfigError, GradientError
from distclip.exchange import Channel
from distclip.groups import ONE, Grouping
from distclip.guard import MODES, OnNonfinite, Streak, Verdict, judge
from distclip.measure import norm_of, power_sums
from distclip.naming import Found, Params, named_parameters
from distclip.placement import Declared, ReplicatedOver, Shared, pieces
from distclip.plan import agree_on_call, make_plan
from distclip.policies import FixedNorm, LocalStats, Policy
from distclip.policies.policy import describe
from distclip.records import ClipReport, Culprit, Decision, Norms, Piece
from distclip.report import Sink, write_all
from distclip.wire import Flags, Wire, extra_words


class GradClipper:
    """Clips the gradients of a model that is held by many ranks, the same way on each.

    Building one is a collective: on all ranks of `process_group`, after wrapping and sharding.

    Args:
        params: a module, a list of modules (the pipeline stages of this rank), (name, parameter) pairs, or parameters.
        max_norm: threshold of the global norm, in the gradients' unit; `math.inf` only measures. Exactly one of `max_norm` and
            `policy`.
        policy: what to do with the norm: `FixedNorm`, `FixedValue`, `Normalize`, or an object with `init` and `decide`.
        norm_type: p of the norm, 0 < p ≤ 8 or inf.
        groups: which parameters share a norm: None (all), `per_parameter()`, `per_layer(depth)`, `per_param_group(optimizer)` or
            `by_name({...})`.
        on_nonfinite: `skip` the step, `raise` NonFiniteError, or `propagate` the gradients as they are; alike on all ranks.
        process_group: None is the default group; `distclip.LOCAL` this process alone.
        replicated_over: name pattern → the group over which those parameters are copies, or `distclip.PRIVATE`.
        shared: tuples of names that are one parameter, tied across ranks.
        grad_of: where a parameter's gradient is, if not in `.grad`.
        drift_tolerance: how far copies may differ, relative to the total power sum; None does not look.
        skip_limit: more bad steps in a row than this end in an error.
        sinks: where reports go, on the first rank of the group.

    Raises:
        ConfigError (a ValueError): an argument that cannot be honoured.
        PlacementError: a parameter whose part on this rank cannot be told.
        AgreementError: ranks differ; raised on all of them.
    """

    def __init__(
        self,
        params: Params,
        max_norm: float | None = None,
        *,
        policy: Policy | None = None,
        norm_type: float = 2.0,
        groups: Grouping | None = None,
        on_nonfinite: OnNonfinite = "skip",
        process_group: ProcessGroup | Any | None = None,
        replicated_over: ReplicatedOver | None = None,
        shared: Shared = (),
        grad_of: GradOf | None = None,
        drift_tolerance: float | None = 1e-5,
        skip_limit: int = 20,
        fold: str = "auto",
        sinks: Sequence[Sink] = (),
    ) -> None:
        self._channel = Channel.over(process_group)
        self._arguments = dict(
            max_norm=max_norm, policy=policy, norm_type=norm_type, groups=groups, on_nonfinite=on_nonfinite,
            drift_tolerance=drift_tolerance, skip_limit=skip_limit, fold=fold,
        )  # fmt: skip
        self._params = params if isinstance(params, (nn.Module, Tensor)) else list(params)
        self._declared = Declared(dict(replicated_over or {}), tuple(tuple(names) for names in shared))
        self._grouping = groups or ONE
        self._grad_of, self._moved = grad_of or own_grad, grad_of is not None
        self._sinks = list(sinks)
        self._step = 0
        self.rebuild()

    # Set-up

    def rebuild(self) -> None:
        """A collective: read the parameters anew and agree on a new plan, after parameters were replaced or the world changed.

        The policy's state stays if the groups do; else it starts anew.
        """
        error: Exception | None = None
        found, local, config = Found(), list[tuple[Any, Piece]](), dict[str, str]()
        try:
            self._check_arguments()
            found = named_parameters(self._params)
            if self._channel.size > 1 and any(n.positional and not hasattr(n.param, "placements") for n in found.named):
                raise ConfigError(
                    "bare parameters have no names, and their positions may mean different parameters on other ranks; "
                    "pass the model, or model.named_parameters()"
                )
            local = pieces(found.named, self._declared, self._channel.global_rank)
            config = self._config()
        except Exception as e:
            error = e
        self._members = [named.param for named, _ in local]
        self._slots = found.slots
        self._device = next((p.device for p in self._members if p.device.type == "cuda"), torch.device("cpu"))
        agree_on_call(self._channel, config, error, self._device)

        group_of = self._grouping.assign([piece.key_name for _, piece in local], self._members)
        patterns = self._declared.patterns() + list(self._grouping.patterns())
        names = {name for _, piece in local for name in (piece.name, piece.key_name)}
        counts = {pattern: sum(fnmatchcase(name, pattern) for name in names) for pattern in patterns}
        rules = self._grouping.rules()
        plan = make_plan(self._channel, [piece for _, piece in local], group_of, counts, self._norm_type, self._device)
        self._parts = split(plan.groups, rules, self._main)
        stats = sum(part.words * len(part.groups) for part in self._parts)
        self.plan = replace(plan, words=len(plan.groups) + extra_words(self._norm_type, stats))
        self._prepare(stats, rules)

    def _prepare(self, stats: int, rules: Mapping[str, Any]) -> None:
        """Buffers and tensors that every step uses."""
        plan, device = self.plan, self._device
        self._wire = Wire(
            self._norm_type, len(plan.groups), stats, self._channel.size,
            torch.tensor([1 / s.holders for s in plan.shares], dtype=torch.float64, device=device),
            torch.tensor([s.weight for s in plan.shares], dtype=torch.float64, device=device),
            torch.tensor(plan.group_of, dtype=torch.int64, device=device),
        )  # fmt: skip
        self._counts_in_total = torch.tensor(in_total(plan.groups, rules), device=device)
        self._members_of = [[i for i, g in enumerate(plan.group_of) if g == group] for group in range(len(plan.groups))]
        state = tuple(part.policy.init(len(part.groups), device) for part in self._parts)
        if getattr(self, "_state_groups", None) != plan.groups:
            self._state, self._state_groups = state, plan.groups
        self._last = torch.zeros(1, dtype=torch.float64, device=device)
        self._warned = False

    def _check_arguments(self) -> None:
        given = self._arguments
        max_norm, policy = given["max_norm"], given["policy"]
        if (max_norm is None) == (policy is None):
            seen = "both" if policy is not None else "neither"
            raise ConfigError(f"pass exactly one of max_norm and policy, not {seen}; there is no default threshold")
        self._main: Policy = cast(Policy, policy) if max_norm is None else FixedNorm(float(cast(float, max_norm)))
        if not (hasattr(self._main, "init") and hasattr(self._main, "decide")):
            raise ConfigError(f"policy={policy!r} has no init and decide; pass e.g. distclip.FixedNorm(1.0)")
        self._norm_type = float(cast(float, given["norm_type"]))
        if not (0 < self._norm_type <= 8 or (math.isinf(self._norm_type) and self._norm_type > 0)):
            raise ConfigError(f"norm_type={given['norm_type']!r}: p must be above 0 and at most 8, or math.inf")
        if given["on_nonfinite"] not in MODES:
            raise ConfigError(f"on_nonfinite={given['on_nonfinite']!r}; it is one of {', '.join(map(repr, MODES))}")
        if given["fold"] not in ("auto", "never"):
            raise ConfigError(f"fold={given['fold']!r}; it is 'auto' or 'never'")
        tolerance, limit = given["drift_tolerance"], cast(int, given["skip_limit"])
        if tolerance is not None and not cast(float, tolerance) > 0:
            raise ConfigError(f"drift_tolerance={tolerance!r} must be positive, or None, which does not look for drift")
        if limit < 0:
            raise ConfigError(f"skip_limit={limit!r} must not be negative; 0 allows no bad step")
        self._tolerance = cast("float | None", tolerance)
        self._streak = Streak(cast(OnNonfinite, given["on_nonfinite"]), limit)

    def _config(self) -> dict[str, str]:
        """What must be equal on all ranks, as texts."""
        config = {name: repr(value) for name, value in self._arguments.items() if name not in ("max_norm", "groups")}
        config["policy"] = describe(self._main)
        config["groups"] = f"{type(self._grouping).__name__}({describe_rules(self._grouping.rules(), describe)})"
        config["replicated_over"] = ", ".join(self._declared.replicated_over)
        config["shared"] = repr(self._declared.shared)
        return config

    # Each step

    @torch._disable_dynamo  # torch.compiler.disable, but without importing the compiler when distclip is imported
    @torch.no_grad()
    def clip_(self, optimizer: Optimizer | None = None, scaler: Any = None, grad_scale: float = 1.0) -> ClipReport:
        """Clip all gradients in place. After backward, before `optimizer.step()`; one all-reduce, on every rank.

        A step that is not finite is skipped by taking the gradients away (`.grad = None`), which every optimizer respects.

        Args:
            grad_scale: a factor (1/tokens, 1/micro-batches) that is applied together with the coefficient; norms are after it.

        Raises:
            NonFiniteError, AgreementError, GradientError: on all ranks alike, before any gradient was touched.
        """
        self._refuse_scaler(scaler)
        norms, decision, grads, report = self._run("clip_", grad_scale)
        if report.skipped:
            if self._moved:
                raise GradientError(
                    f"step {report.step} is to be skipped, and clip_ cannot take away gradients that grad_of finds elsewhere; "
                    "use clipper.step(optimizer), which leaves the optimizer out"
                )
            apply.drop(self._members)
        else:
            self._apply(decision, grads, grad_scale, bool(norms.finite))
        self._write(report)
        return report

    @torch._disable_dynamo  # torch.compiler.disable, but without importing the compiler when distclip is imported
    @torch.no_grad()
    def step(self, *optimizers: Optimizer, scaler: Any = None, update_scaler: bool = True, grad_scale: float = 1.0) -> ClipReport:
        """Clip, then step the optimizers; a step that is not finite calls none of them. One all-reduce.

        Raises:
            ConfigError: no optimizer was passed.
        """
        if not optimizers:
            raise ConfigError("step() was given no optimizer; pass those that hold the clipped parameters, or use clip_()")
        self._refuse_scaler(scaler)
        norms, decision, grads, report = self._run("step", grad_scale)
        if not report.skipped:
            self._apply(decision, grads, grad_scale, bool(norms.finite))
            for optimizer in optimizers:
                optimizer.step()
        self._write(report)
        return report

    @torch._disable_dynamo  # torch.compiler.disable, but without importing the compiler when distclip is imported
    @torch.no_grad()
    def measure(self) -> ClipReport:
        """Norms only: nothing is touched, nothing skipped or counted, inf and NaN are reported. One all-reduce."""
        return self._run("measure", 1.0)[3]

    @torch.no_grad()
    def audit(self) -> None:
        """A collective: AgreementError, naming parameters and ranks, if gradients that should be copies are not equal."""
        grads = self._run("audit", 1.0)[2]
        self._compare(grads)

    @staticmethod
    def _refuse_scaler(scaler: Any) -> None:
        """A scaler is the same object of the program on every rank, so that this refusal is alike on all."""
        if scaler is not None and scaler.is_enabled():
            raise ConfigError(
                "scaler= is not supported yet; train in bfloat16 or float32, or unscale with scaler.unscale_(optimizer) before clip_()"
            )

    def _run(self, operation: str, grad_scale: float) -> tuple[Norms, Decision, Grads, ClipReport]:
        """Collect → measure → exchange → decide → guard: everything before a gradient is touched."""
        self._step += 1
        grads, message = self._measure(operation, grad_scale)
        self._channel.reduce_(message, "sum" if math.isfinite(self._norm_type) else "max", f"{operation} at step {self._step}")
        message = message.to(self._device)
        norms = self._norms(message, grad_scale)
        decision, state = decide(self._parts, norms, self._state)
        flags = self._wire.flags(message.tolist())
        passive = operation in ("measure", "audit")
        culprits = self._guard(flags, grads, operation, passive)
        skipped = bool(flags.bad or not norms.finite) and not passive and self._streak.mode != "propagate"
        if not passive:
            self._state = kept(self._state, state, norms.finite)
            self._last = (decision.coef.view(torch.int64).sum() & 0xFFFF).double().reshape(1)
        return norms, decision, grads, self._report(norms, decision, skipped, culprits, passive)

    def _measure(self, operation: str, grad_scale: float) -> tuple[Grads, Tensor]:
        """This rank's part of the message. Whatever goes wrong here travels in it, so that no rank waits for another."""
        device, count = self._device, len(self.plan.pieces)
        sums, has = (torch.zeros(count, dtype=torch.float64, device=device) for _ in range(2))
        stats = torch.zeros(self._wire.stats, dtype=torch.float64, device=device)
        grads = Grads()
        try:
            grads = collect(self._members, self.plan.pieces, self._slots, self._grad_of)
            if not math.isfinite(grad_scale) or grad_scale <= 0:
                grads.faults.append(f"grad_scale={grad_scale!r} must be positive and finite")
            elif not grads.faults:
                sums[grads.index] = power_sums(grads.local, self._norm_type).to(device)
                has[grads.present] = 1.0
                self._local_stats(stats, grads, grad_scale)
        except Exception as error:
            grads.faults.append(f"{type(error).__name__}: {error}")
        tokens = torch.tensor([self._step & 0xFFFF, key(operation) & 0xFFFF], dtype=torch.float64, device=device)
        message = self._wire.pack(sums, has, stats, bool(grads.faults), torch.cat([tokens, self._last]))
        return grads, message.to(self._channel.device_for(device))

    def _local_stats(self, stats: Tensor, grads: Grads, grad_scale: float) -> None:
        if not self._wire.stats:
            return
        local = dict(zip(grads.index, grads.local, strict=True))
        scale = torch.tensor(grad_scale, dtype=torch.float64, device=self._device)
        for part in self._parts:
            if isinstance(part.policy, LocalStats):
                rows = [
                    part.policy.local_stats(
                        [local[i] for i in self._members_of[group] if i in local],
                        [1 / self.plan.shares[i].holders for i in self._members_of[group] if i in local],
                        scale,
                        self._norm_type,
                    )
                    for group in part.groups
                ]
                stats[part.stats] = torch.cat(rows)

    def _norms(self, message: Tensor, grad_scale: float) -> Norms:
        sums, stats, bad = self._wire.sums(message)
        per_group = norm_of(sums, self._norm_type) * grad_scale
        counted = torch.where(self._counts_in_total, sums, 0.0)
        total = norm_of(counted.max() if math.isinf(self._norm_type) else counted.sum(), self._norm_type) * grad_scale
        finite = sums.isfinite().all() & (bad == 0)
        return Norms(per_group, total, finite, bad.to(torch.int64), stats, self._norm_type)

    def _guard(self, flags: Flags, grads: Grads, operation: str, passive: bool) -> tuple[Culprit, ...]:
        """Raises on all ranks alike, or returns the culprits of a first bad step."""
        verdict = judge(flags, None if operation == "audit" else self._tolerance)
        if verdict is Verdict.DISAGREE:
            doing = {"call": self._step, "of": operation, "after decision": int(self._last)}
            raise audit.name_disagreement(self._channel, doing, self._step, self._device)
        if verdict is Verdict.FAULT:
            raise GradientError(f"step {self._step}: " + audit.name_faults(self._channel, grads.faults, self._device))
        if verdict in (Verdict.RAGGED, Verdict.DRIFT):
            self._compare(grads)
            raise AgreementError(
                f"step {self._step}: copies of gradients differ (drift {flags.drift:.3g} of {flags.total:.3g}), none alone by much"
            )
        if not flags.present and not self._warned and not passive:
            self._warned = True
            warnings.warn(
                "no parameter has a gradient on any rank: nothing was clipped. Call it after backward() and before zero_grad(); "
                "an optimizer that steps inside backward leaves none",
                RuntimeWarning,
                stacklevel=4,
            )
        if verdict is not Verdict.NONFINITE:
            if not passive:
                self._streak.good()
            return ()
        if passive:
            return ()
        must_raise = self._streak.bad(patient=False)
        culprits: tuple[Culprit, ...] = ()
        if self._streak.length == 1 or must_raise:
            local = dict(zip(grads.index, grads.local, strict=True))
            culprits = audit.name_culprits(self._channel, self.plan, local, self._device)
        if must_raise:
            raise self._streak.error(self._step, int(flags.bad), culprits)
        return culprits

    def _compare(self, grads: Grads) -> None:
        local = dict(zip(grads.index, grads.local, strict=True))
        audit.compare_replicas(self._channel, self.plan, local, self._tolerance or 1e-5, self._step, self._device)

    def _apply(self, decision: Decision, grads: Grads, grad_scale: float, finite: bool) -> None:
        """One multiply a gradient, none where the factor is 1; gradients that are not finite are left as they are."""
        if not finite:
            return
        coefs, here = decision.coef.tolist(), dict(zip(grads.index, grads.local, strict=True))
        clipped = decision.clipped.tolist()
        for group, members in enumerate(self._members_of):
            tensors = [here[i] for i in members if i in here]
            if coefs[group] * grad_scale != 1:
                apply.scale_(tensors, decision.coef[group] * grad_scale)
            if group in decision.clamped and clipped[group]:
                apply.clamp_(tensors, decision.threshold[group])

    def _report(self, norms: Norms, decision: Decision, skipped: bool, culprits: tuple[Culprit, ...], passive: bool) -> ClipReport:
        wide = any(p.dtype in (torch.float64, torch.complex128) for p in self._members)
        dtype = torch.float64 if wide and self._channel.size == 1 else torch.float32
        clipped = torch.zeros_like(decision.clipped) if skipped or passive else decision.clipped & norms.finite
        coefs = torch.where(norms.finite, decision.coef, 0.0 if skipped else 1.0)
        counted = torch.where(self._counts_in_total, torch.where(norms.finite, decision.norms_after, norms.per_group), 0.0)
        p = self._norm_type
        after = counted.max() if math.isinf(p) else norm_of(counted.pow(p).sum(), p)
        if len(self.plan.groups) == 1:
            after = counted[0]
        return ClipReport(
            self._step, norms.total.to(dtype), after.to(dtype), clipped.any(), torch.tensor(skipped, device=self._device),
            norms.nonfinite, coefs.to(dtype), decision.threshold.to(dtype), norms.per_group.to(dtype), self.plan.groups, culprits,
        )  # fmt: skip

    def _write(self, report: ClipReport) -> None:
        if self._channel.rank == 0:
            self._sinks = write_all(self._sinks, report)

    # State

    def state_dict(self) -> dict[str, Any]:
        """A flat record of tensors and strings: equal on all ranks, independent of world size and sharding. Loads with `weights_only`."""
        tensors = {f"{i}.{j}": t for i, state in enumerate(self._state) for j, t in enumerate(state)}
        counters = {"step": torch.tensor(self._step), "bad_in_a_row": torch.tensor(self._streak.length)}
        return {**counters, "policy": describe(self._main), "groups": "\n".join(self.plan.groups), **tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, on another world size or sharding too. Sends nothing.

        Raises:
            ConfigError: it belongs to another policy or to other groups.
        """
        for name, own in (("policy", describe(self._main)), ("groups", "\n".join(self.plan.groups))):
            if state.get(name) != own:
                raise ConfigError(f"the checkpoint's {name} is {state.get(name)!r}, this clipper's {own!r}; build it as the saved one was")
        self._step, self._streak.length = int(state["step"]), int(state["bad_in_a_row"])
        self._state = tuple(tuple(state[f"{i}.{j}"].to(t.device, t.dtype) for j, t in enumerate(own)) for i, own in enumerate(self._state))
