"""`GradClipper`: wires the stages. It reads top to bottom like the picture in the README, and owns every buffer."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from distclip import apply, audit, fold
from distclip.agreement import key
from distclip.amp import Handshake, innermost
from distclip.calls import Call, halves
from distclip.collecting import GradOf, Grads, collect, own_grad
from distclip.deciding import decide, in_total, kept, split
from distclip.errors import AgreementError, ConfigError, GradientError
from distclip.exchange import Channel
from distclip.groups import Grouping
from distclip.guard import OnNonfinite, Streak, Verdict, judge
from distclip.host import Mirror
from distclip.measure import norm_of, power_sums
from distclip.naming import Found, Params, named_parameters
from distclip.options import Asked, Options, checked
from distclip.owners import Owners, strangers
from distclip.placement import Declared, ReplicatedOver, Shared, local_tensor, pieces
from distclip.plan import Plan, agree_on_call, make_plan
from distclip.policies import LocalStats, Policy
from distclip.policies.policy import describe
from distclip.records import ClipReport, Culprit, Decision, Norms, Piece
from distclip.report import Sink, Writer
from distclip.wire import Wire, extra_words


@dataclass(slots=True)
class Seen:
    """What one call measured on this rank and learned from all; kept until it is judged."""

    step: int
    call: Call
    grads: Grads | None  # None once they may have changed
    faults: list[str]  # what this rank found wrong
    last: Tensor  # [1] float64: the token of the decision before
    sums: Tensor  # [pieces] float64
    has: Tensor  # [pieces] float64


class Known(NamedTuple):
    """What the host has read of an outcome."""

    coefs: list[float]
    inverse: float  # of the scaler's scale
    skip: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call is to do to the gradients."""

    decision: Decision
    grads: Grads
    finite: Tensor  # [] bool
    stop: Tensor  # [] float32: 1 where no optimizer may move
    overflow: Tensor  # [] float32: what a scaler is told; a step that a policy leaves out is no overflow
    known: Known | None  # None where the host has not read anything
    report: ClipReport


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
        fold: `auto` lets fused optimizers apply the coefficient in their own pass in `step`, where that is the same; `never` does not.
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
        self._asked = Asked(max_norm, policy, norm_type, groups, on_nonfinite, drift_tolerance, skip_limit, fold)
        self._params = params if isinstance(params, (nn.Module, Tensor)) else list(params)
        self._declared = Declared(dict(replicated_over or {}), tuple(tuple(names) for names in shared))
        self._grad_of, self._moved = grad_of or own_grad, grad_of is not None
        self._writer = Writer(sinks if self._channel.rank == 0 else ())
        weakref.finalize(self, self._writer.flush)  # at the latest when the program ends
        self._step = 0
        self._decided: tuple[Call, Outcome] | None = None
        self.last_report: ClipReport | None = None  # of clip_, step or decide: for those who do not make these calls themselves
        self.rebuild()

    # Set-up

    def rebuild(self) -> None:
        """A collective: read the parameters anew and agree on a new plan, after parameters were replaced or the world changed.

        The policy's state stays if the groups do; else it starts anew.
        """
        error: Exception | None = None
        found, local, config, group_of = Found(), list[tuple[Any, Piece]](), dict[str, str](), list[str]()
        try:
            self._options: Options = checked(self._asked)
            found = named_parameters(self._params)
            if self._channel.size > 1 and any(n.positional and not hasattr(n.param, "placements") for n in found.named):
                raise ConfigError(
                    "bare parameters have no names, and their positions may mean different parameters on other ranks; "
                    "pass the model, or model.named_parameters()"
                )
            local = pieces(found.named, self._declared, self._channel.global_rank)
            group_of = self._options.grouping.assign([piece.key_name for _, piece in local], [named.param for named, _ in local])
            declared = {"replicated_over": ", ".join(self._declared.replicated_over), "shared": repr(self._declared.shared)}
            config = self._options.texts() | declared
        except Exception as e:
            error = e
        self._members = [named.param for named, _ in local]
        self._slots = found.slots
        self._device = next((p.device for p in self._members if p.device.type == "cuda"), torch.device("cpu"))
        agree_on_call(self._channel, config, error, self._device)

        self._config = str(sorted(config.items()))
        patterns = self._declared.patterns() + list(self._options.grouping.patterns())
        names = {name for _, piece in local for name in (piece.name, piece.key_name)}
        counts = {pattern: sum(fnmatchcase(name, pattern) for name in names) for pattern in patterns}
        plan = make_plan(self._channel, [piece for _, piece in local], group_of, counts, self._options.norm_type, self._device)
        self._prepare(plan)

    def _prepare(self, plan: Plan) -> None:
        """Buffers and tensors that every step uses."""
        device, p, rules = self._device, self._options.norm_type, self._options.grouping.rules()
        self._parts = split(plan.groups, rules, self._options.policy, device)
        stats = sum(part.words * len(part.groups) for part in self._parts)
        self.plan = replace(plan, words=len(plan.groups) + extra_words(p, stats))
        self._wire = Wire(
            p, len(plan.groups), stats, self._channel.size,
            torch.tensor([1 / s.holders for s in plan.shares], dtype=torch.float64, device=device),
            torch.tensor([s.weight for s in plan.shares], dtype=torch.float64, device=device),
            torch.tensor(plan.group_of, dtype=torch.int64, device=device),
        )  # fmt: skip
        self._counts_in_total = torch.tensor(in_total(plan.groups, rules), device=device)
        self._members_of = [[i for i, g in enumerate(plan.group_of) if g == group] for group in range(len(plan.groups))]
        self._alike = [frozenset(id(self._members[i]) for i in members) for members in self._members_of]
        self._owners = Owners(self._members, plan.group_of)
        state = tuple(part.policy.init(len(part.groups), device) for part in self._parts)
        if getattr(self, "_state_groups", None) != plan.groups:
            self._state, self._state_groups = state, plan.groups
        nothing = torch.zeros(len(plan.groups), dtype=torch.float64, device=device)
        idle = Norms(nothing, nothing.sum(), nothing.sum() == 0, nothing.sum().long(), nothing.new_zeros(stats), p)
        self._clamped = decide(self._parts, idle, state)[0].clamped
        # a power sum moves p times as much as its norm: below p = 1 the tolerance shrinks with it
        tolerance = self._options.drift_tolerance
        self._tolerance = tolerance and tolerance * min(1.0, p)
        self._streak = Streak(self._options.on_nonfinite, self._options.skip_limit)
        self._last = torch.zeros(1, dtype=torch.float64, device=device)
        self._nothing = torch.zeros(len(plan.pieces), dtype=torch.float64, device=device)
        self._index: tuple[list[int], Tensor] = ([], torch.zeros(0, dtype=torch.int64, device=device))
        draw = torch.Generator().manual_seed(1)
        self._mixers = torch.randint(1 << 62, (2, len(plan.groups)), generator=draw).bitwise_or(1).to(device)
        self._warned = False
        self._may_wait = device.type == "cuda"  # elsewhere reading a number costs nothing
        self._unjudged: Mirror[Seen] = Mirror()

    # Each step

    @torch._disable_dynamo  # torch.compiler.disable, but without importing the compiler when distclip is imported
    @torch.no_grad()
    def clip_(self, optimizer: Optimizer | Sequence[Optimizer] | None = None, scaler: Any = None, grad_scale: float = 1.0) -> ClipReport:
        """Clip all gradients in place. After backward, before `optimizer.step()`; one all-reduce, on every rank.

        A step that is not finite is skipped by taking the gradients away (`.grad = None`), which every optimizer respects.

        Args:
            optimizer: one or several, whose gradients `scaler` scaled; all their gradients are taken away at a skipped step.
            scaler: an enabled GradScaler: gradients are unscaled in the same multiply (unless `scaler.unscale_` was called) and the
                overflow that all ranks agreed on is recorded; `scaler.step(optimizer)` and `scaler.update()` follow as usual.
            grad_scale: a factor (1/tokens, 1/micro-batches) that is applied together with the coefficient; norms are after it.

        Raises:
            NonFiniteError, AgreementError, GradientError, ConfigError: on all ranks alike, before any gradient was touched.
        """
        optimizers = () if optimizer is None else (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
        call = self._call("clip_", optimizers, scaler, grad_scale)
        outcome = self._run(call, may_wait=self._options.on_nonfinite == "propagate")
        if outcome.known is not None and outcome.known.skip:
            gone = [p for p in self._members if not self._moved or self._grad_of(p) is not None]
            if self._moved and not call.hands.enabled and any(p.grad is not self._grad_of(p) for p in gone):
                raise GradientError(
                    f"step {self._step} is to be skipped, and clip_ cannot take away gradients that grad_of finds elsewhere; "
                    "use clipper.step(optimizer), which leaves the optimizer out"
                )
            apply.drop([*gone, *(p for o in call.owned for p in o.others)])
        else:
            self._apply(call, outcome, frozenset())
        call.hands.tell(outcome.overflow, stepped=False)
        self._writer.write(outcome.report, self._may_wait)
        return outcome.report

    @torch._disable_dynamo  # torch.compiler.disable, but without importing the compiler when distclip is imported
    @torch.no_grad()
    def step(self, *optimizers: Optimizer, scaler: Any = None, update_scaler: bool = True, grad_scale: float = 1.0) -> ClipReport:
        """Unscale, clip, step the optimizers, update the scaler; a step that is not finite moves nothing. One all-reduce.

        A fused SGD, Adam, AdamW or Adagrad whose parameters share one coefficient applies it in its own pass (`fold="never"`: never).

        Args:
            scaler: an enabled GradScaler; unscaling is part of the same multiply, unless `scaler.unscale_` was called.
            update_scaler: call `scaler.update()` at the end; False where another clipper's step with this scaler follows.
            grad_scale: a factor (1/tokens, 1/micro-batches) that is applied together with the coefficient; norms are after it.

        Raises:
            ConfigError: no optimizer was passed, or a scaler together with on_nonfinite="propagate" (it would never learn).
            NonFiniteError, AgreementError, GradientError: on all ranks alike, before anything was touched.
        """
        call = self._call("step", optimizers, scaler, grad_scale)
        folding = self._folding(call)
        outcome = self._run(call, len(folding) == len(call.owned) or self._options.on_nonfinite == "propagate")
        if outcome.known is None or not outcome.known.skip:
            self._apply(call, outcome, frozenset[int]().union(*(call.owned[k].pieces for k in folding)))
            for k, owned in enumerate(call.owned):
                if k in folding:
                    factor = self._factor(call, outcome, folding[k], bool(call.hands.scaled[k]))
                    fold.step_folded(owned.optimizer, factor, outcome.stop if outcome.known is None else None)
                else:
                    (owned.optimizer if call.hands.enabled else owned.given).step()
        call.hands.tell(outcome.overflow, stepped=True)
        if call.hands.enabled and update_scaler:
            scaler.update()
        self._writer.write(outcome.report, self._may_wait)
        return outcome.report

    @torch._disable_dynamo  # torch.compiler.disable, but without importing the compiler when distclip is imported
    @torch.no_grad()
    def decide(self, grad_scale: float = 1.0, rescaled: bool = False) -> ClipReport:
        """`clip_` up to the decision, for engines that own the step: no gradient is touched. One all-reduce, on every rank.

        The engine leaves the step out where `report.skipped`; else it passes what it steps to `apply_`.

        Args:
            grad_scale: 1 / the engine's loss scale, where gradients still carry it; norms are after it.
            rescaled: the engine lowers its loss scale after a step that is not finite: `raise` then waits for `skip_limit` in a row.

        Raises:
            NonFiniteError, AgreementError, GradientError, ConfigError: on all ranks alike.
        """
        call = replace(self._call("decide", grad_scale=grad_scale), patient=rescaled)
        outcome = self._run(call, may_wait=self._options.on_nonfinite == "propagate")
        self._decided = call, outcome
        self._writer.write(outcome.report, self._may_wait)
        return outcome.report

    @torch.no_grad()
    def apply_(self, params: Iterable[Tensor]) -> None:
        """What the last `decide` decided, on the gradients that these parameters have now; in place, sends nothing.

        Args:
            params: some or all of the clipper's; each once after a `decide`. `grad_of` is asked anew, so that the gradients may be other
                tensors than those that were measured (float32 copies of bf16 ones).

        Raises:
            ConfigError: nothing was decided, or the step is to be left out.
        """
        if self._decided is None:
            raise ConfigError("apply_() applies what decide() decided; call decide() first, on all ranks")
        call, outcome = self._decided
        if outcome.known is not None and outcome.known.skip:
            raise ConfigError(f"step {self._step} is to be left out (report.skipped); there is nothing to apply")
        asked = {id(param) for param in params}
        found = [(i, self._grad_of(param)) for i, param in enumerate(self._members) if id(param) in asked]
        here = [(i, local_tensor(grad)) for i, grad in found if grad is not None]
        self._apply(call, replace(outcome, grads=Grads([i for i, _ in here], [grad for _, grad in here])), frozenset())

    @torch._disable_dynamo  # torch.compiler.disable, but without importing the compiler when distclip is imported
    @torch.no_grad()
    def measure(self) -> ClipReport:
        """Norms only: nothing is touched, nothing skipped or counted, inf and NaN are reported. One all-reduce."""
        return self._run(self._call("measure"), may_wait=True).report

    @torch.no_grad()
    def audit(self) -> None:
        """A collective: AgreementError, naming parameters and ranks, if gradients that should be copies are not equal."""
        grads = self._run(self._call("audit"), may_wait=False).grads
        self._compare(self._step, {i: audit.fingerprint(g) for i, g in zip(grads.index, grads.local, strict=True)})

    def _call(self, operation: str, optimizers: Sequence[Optimizer] = (), scaler: Any = None, grad_scale: float = 1.0) -> Call:
        """What is wrong with the arguments is told once all ranks have met: it may be wrong on one of them alone."""
        inner = [innermost(optimizer) for optimizer in optimizers]
        problem: ConfigError | None = None
        hands = Handshake(None, inner, self._device)
        try:
            if operation == "step" and not optimizers:
                raise ConfigError("step() was given no optimizer; pass those that hold the clipped parameters, or use clip_()")
            if len({id(optimizer) for optimizer in inner}) < len(inner):
                raise ConfigError("step() was given one optimizer twice; it would step twice")
            if not 0 < grad_scale < math.inf:
                raise ConfigError(f"grad_scale={grad_scale!r} must be positive and finite")
            hands = Handshake(scaler, inner, self._device)
            if hands.enabled and self._options.on_nonfinite == "propagate":
                raise ConfigError(
                    "on_nonfinite='propagate' and an enabled scaler exclude each other: steps that overflow must be skipped, else the "
                    "scaler never finds its scale; use 'skip'"
                )
        except ConfigError as error:
            problem = error
        return Call(operation, tuple(map(self._owners.of, optimizers)), hands, float(grad_scale), problem)

    def _folding(self, call: Call) -> dict[int, int]:
        """Optimizer → the group whose coefficient it applies by itself."""
        if self._options.fold == "never" or self._moved:
            return {}
        return {
            k: owned.group
            for k, owned in enumerate(call.owned)
            if owned.group is not None
            and owned.group not in self._clamped
            and fold.can_fold(owned.optimizer, self._alike[owned.group])
            and (not self._may_wait or fold.may_stop(owned.optimizer))
        }

    def _run(self, call: Call, may_wait: bool) -> Outcome:
        """Collect → measure → exchange → decide → guard: everything before a gradient is touched.

        Args:
            may_wait: what the message says may be judged at the next call, since no optimizer moves on a bad step anyway.
        """
        self._settle()
        self._step += 1
        seen, message = self._measure(call)
        op = "sum" if math.isfinite(self._options.norm_type) else "max"
        self._channel.reduce_(message, op, f"{call.operation} at step {self._step}")
        message = message.to(self._device)
        norms = self._norms(message)
        decision, state = decide(self._parts, norms, self._state)
        grads, known, culprits = seen.grads or Grads(), None, tuple[Culprit, ...]()
        skips = not call.passive and self._options.on_nonfinite != "propagate"
        if self._may_wait and may_wait:
            stop = self._wire.stop(message, self._tolerance)
            seen.grads = None
            self._unjudged.leave(torch.cat([message, decision.skip.double().reshape(1)]), seen)
        else:
            inverse = torch.as_tensor(call.inverse, dtype=torch.float64, device=self._device).reshape(1)
            coefs = torch.where(norms.finite, decision.coef, 1.0)
            flags = torch.stack([norms.finite, decision.skip]).double()
            *host, scale, finite, leave = Mirror.now(torch.cat([message, coefs, inverse, flags]))
            known = Known(host[message.numel() :], scale, bool((skips and not finite) or (leave and finite and not call.passive)))
            culprits = self._judge(seen, host[: message.numel()], bool(leave))
            stop = (~norms.finite).float()
        overflow = stop if skips else torch.zeros_like(stop)
        if not call.passive:
            self._state = kept(self._state, state, norms.finite & (stop == 0) & ~decision.skip)
            self._last = self._token(decision)
            stop = torch.maximum(overflow, (decision.skip & norms.finite).float())
        else:
            stop = overflow
        report = self._report(call, norms, decision, stop > 0, culprits)
        self._decided = None
        if not call.passive:
            self.last_report = report
        return Outcome(decision, grads, norms.finite, stop, overflow, known, report)

    def _measure(self, call: Call) -> tuple[Seen, Tensor]:
        """This rank's part of the message. Whatever goes wrong here travels in it, so that no rank waits for another."""
        device, p = self._device, self._options.norm_type
        sums = has = self._nothing
        stats = torch.zeros(self._wire.stats, dtype=torch.float64, device=device)
        found = torch.zeros((), dtype=torch.float64, device=device)
        grads = Grads()
        try:
            grads = collect(self._members, self.plan.pieces, self._slots, self._grad_of)
            grads.faults += strangers(call.owned, {i: piece.name for i, piece in enumerate(self.plan.pieces[:1])})
            if not grads.faults and call.problem is None:
                own = power_sums(grads.local, p).to(device)
                powers = call.powers(grads.index, p, device)
                sums = self._placed(grads.index, own if powers is None else own * powers)
                has = self._placed(grads.present, self._nothing.new_ones(len(grads.present)))
                found = torch.maximum(call.hands.found(device), (~power_sums(call.others(), math.inf).isfinite()).sum().to(device))
                self._local_stats(stats, grads, call)
        except Exception as error:
            grads.faults.append(f"{type(error).__name__}: {error}")
        # filled in on the device: a tensor made from a list would make the host wait for it
        counter, doing = (self._last.new_full((1,), token & 0xFFFF) for token in (self._step, key(call.text + self._config)))
        message = self._wire.pack(sums, has, stats, found, bool(grads.faults), torch.cat([counter, doing, self._last]))
        return Seen(self._step, call, grads, grads.faults, self._last, sums, has), message.to(self._channel.device_for(device))

    def _placed(self, index: list[int], values: Tensor) -> Tensor:
        """[pieces]: `values` at `index`, 0 elsewhere. The index is copied to the device only when it changes."""
        if len(index) == len(self.plan.pieces):
            return values
        if self._index[0] != index:
            self._index = (list(index), torch.tensor(index, dtype=torch.int64, device=self._device))
        return self._nothing.index_copy(0, self._index[1], values)

    def _local_stats(self, stats: Tensor, grads: Grads, call: Call) -> None:
        """What policies want to know besides the norm; gradients with and without a scaler's scale apart."""
        p, local, unscaled = self._options.norm_type, dict(zip(grads.index, grads.local, strict=True)), call.unscaled()
        scales = (call.inverse * call.grad_scale, call.grad_scale)
        for part in self._parts:
            if not isinstance(part.policy, LocalStats):
                continue
            rows = stats[part.stats].view(len(part.groups), part.words)
            for row, group in zip(rows, part.groups, strict=True):
                for half, scale in zip(halves(filter(local.__contains__, self._members_of[group]), unscaled), scales, strict=True):
                    shares = [1 / self.plan.shares[i].holders for i in half]
                    factor = torch.as_tensor(scale, dtype=torch.float64, device=self._device)
                    if half or scale is scales[0]:
                        more = part.policy.local_stats([local[i] for i in half], shares, factor, p)
                        row.copy_(torch.maximum(row, more) if math.isinf(p) else row + more)

    def _norms(self, message: Tensor) -> Norms:
        p = self._options.norm_type
        sums, stats, bad = self._wire.sums(message)
        counted = torch.where(self._counts_in_total, sums, 0.0)
        total = norm_of(counted.max() if math.isinf(p) else counted.sum(), p)
        finite = sums.sum().isfinite() & (bad == 0)
        return Norms(norm_of(sums, p), total, finite, bad.to(torch.int64), stats, p)

    def _token(self, decision: Decision) -> Tensor:
        """[1] float64 below 65536: a hash of the decision's bits, which the next message compares over the ranks."""
        bits = torch.stack([decision.coef, decision.threshold]).view(torch.int64)
        return (((bits * self._mixers) >> 40).sum() & 0xFFFF).double().reshape(1)

    # Judging: alike on every rank, from the reduced message

    def _settle(self) -> None:
        """Judge what the previous call left; its step was not taken if it was bad."""
        late = self._unjudged.taken()
        if late is not None:
            culprits = self._judge(late.what, late.numbers[:-1], bool(late.numbers[-1]))
            self._writer.amend(culprits)

    def _judge(self, seen: Seen, message: list[float], left_out: bool) -> tuple[Culprit, ...]:
        """Raises on all ranks alike, or returns the culprits of a first bad step.

        Args:
            left_out: a policy decided to leave this step out.
        """
        call, step, flags = seen.call, seen.step, self._wire.flags(message)
        verdict = judge(flags, None if call.operation == "audit" else self._tolerance)
        if verdict is Verdict.DISAGREE:
            doing = f"at step {step}: {call.text}, after decision {int(seen.last):04x}, options {key(self._config) & 0xFFFF:04x}"
            raise audit.name_disagreement(self._channel, doing, self._device)
        if call.problem is not None:
            raise call.problem
        if verdict is Verdict.FAULT:
            raise GradientError(f"step {step}: " + audit.name_faults(self._channel, seen.faults, self._device))
        if verdict in (Verdict.RAGGED, Verdict.DRIFT):
            self._compare(step, self._prints(seen))
            raise AgreementError(
                f"step {step}: copies of gradients differ (drift {flags.drift:.3g} of {flags.total:.3g}), none alone by much"
            )
        if not flags.present and not self._warned and not call.passive:
            self._warned = True
            warnings.warn(
                "no parameter has a gradient on any rank: nothing was clipped. Call it after backward() and before zero_grad()",
                RuntimeWarning,
                stacklevel=5,
            )
        if call.passive:
            return ()
        if verdict is not Verdict.NONFINITE:
            if not left_out:
                self._streak.good()
            elif self._streak.spike():
                raise self._streak.spike_error(step)
            return ()
        must_raise = self._streak.bad(patient=call.hands.enabled or call.patient)
        culprits: tuple[Culprit, ...] = ()
        if self._streak.length == 1 or must_raise:
            culprits = audit.name_culprits(self._channel, self.plan, Mirror.now(seen.sums), self._device)
        if must_raise:
            raise self._streak.error(step, int(flags.bad), culprits)
        return culprits

    def _prints(self, seen: Seen) -> audit.Prints:
        """Fingerprints of the gradients; where they are gone, their norms."""
        if seen.grads is not None:
            return {i: audit.fingerprint(g) for i, g in zip(seen.grads.index, seen.grads.local, strict=True)}
        squares = Mirror.now(norm_of(seen.sums, self._options.norm_type).square())
        return {i: (squares[i], 0.0) for i, has in enumerate(Mirror.now(seen.has)) if has}

    def _compare(self, step: int, prints: audit.Prints) -> None:
        audit.compare_replicas(self._channel, self.plan, prints, self._tolerance or 1e-5, step, self._device)

    # Acting

    def _factor(self, call: Call, outcome: Outcome, group: int, scaled: bool) -> Tensor | None:
        """[] float64: what a group's gradients are multiplied by, or None where that is known to be 1."""
        scale = call.inverse * call.grad_scale if scaled else call.grad_scale
        known = outcome.known
        if known is not None and known.coefs[group] * (known.inverse if scaled else 1.0) * call.grad_scale == 1:
            return None
        return torch.where(outcome.finite, outcome.decision.coef[group], 1.0) * scale

    def _apply(self, call: Call, outcome: Outcome, folded: frozenset[int]) -> None:
        """One multiply a gradient, none where the factor is 1; clamps after it. `folded` pieces are left to their optimizers."""
        here = dict(zip(outcome.grads.index, outcome.grads.local, strict=True))
        decision, unscaled = outcome.decision, call.unscaled()
        for group, members in enumerate(self._members_of):
            factors = [self._factor(call, outcome, group, scaled) for scaled in ((True, False) if unscaled else (True,))]
            if group not in decision.clamped and all(factor is None for factor in factors):
                continue
            mine = [i for i in members if i in here and i not in folded]
            for half, factor in zip(halves(mine, unscaled), factors):
                if half and factor is not None:
                    apply.scale_([here[i] for i in half], factor)
            if group in decision.clamped and mine:
                apply.clamp_([here[i] for i in mine], torch.where(outcome.finite, decision.threshold[group], math.inf))
        if (others := call.others()) and call.hands.inverse is not None:
            apply.scale_(others, call.hands.inverse)

    def _report(self, call: Call, norms: Norms, decision: Decision, skipped: Tensor, culprits: tuple[Culprit, ...]) -> ClipReport:
        wide = any(p.dtype in (torch.float64, torch.complex128) for p in self._members)
        dtype = torch.float64 if wide and self._channel.size == 1 else torch.float32
        acted = norms.finite & ~skipped & (not call.passive)
        coefs = torch.where(skipped, 0.0, torch.where(norms.finite, decision.coef, 1.0))
        counted = torch.where(self._counts_in_total, torch.where(norms.finite, decision.norms_after, norms.per_group), 0.0)
        p = self._options.norm_type
        after = counted.max() if math.isinf(p) else norm_of(counted.pow(p).sum(), p)
        if len(self.plan.groups) == 1:
            after = counted[0]
        return ClipReport(
            self._step, norms.total.to(dtype), after.to(dtype), (decision.clipped & acted).any(), skipped,
            norms.nonfinite, coefs.to(dtype), decision.threshold.to(dtype), norms.per_group.to(dtype), self.plan.groups, culprits,
        )  # fmt: skip

    # State

    def state_dict(self) -> dict[str, Any]:
        """A flat record of tensors and strings: equal on all ranks, independent of world size and sharding. Loads with `weights_only`."""
        tensors = {f"{i}.{j}": t.clone() for i, state in enumerate(self._state) for j, t in enumerate(state)}
        counters = {"step": torch.tensor(self._step), "bad_in_a_row": torch.tensor(self._streak.length)}
        return {**counters, "policy": describe(self._options.policy), "groups": "\n".join(self.plan.groups), **tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, on another world size or sharding too. Sends nothing.

        Raises:
            ConfigError: it was cut short, or belongs to another policy or to other groups; nothing was taken over.
        """
        own = self.state_dict()
        lost = sorted(own.keys() - state.keys())
        if lost:
            raise ConfigError(f"the checkpoint of the clipper lacks {', '.join(lost)}; it was cut short, or saved by something else")
        for name in ("policy", "groups"):
            if state[name] != own[name]:
                raise ConfigError(
                    f"the checkpoint's {name} is {state[name]!r}, this clipper's {own[name]!r}; build it as the saved one was"
                )
        tensors = [name for name, value in own.items() if isinstance(value, Tensor)]
        for name in tensors:
            if not isinstance(state[name], Tensor) or state[name].shape != own[name].shape:
                seen = tuple(state[name].shape) if isinstance(state[name], Tensor) else type(state[name]).__name__
                raise ConfigError(f"the checkpoint's {name} is {seen}, not a tensor of shape {tuple(own[name].shape)}; was it cut short?")
        self._step, self._streak.length = int(state["step"]), int(state["bad_in_a_row"])
        self._state = tuple(
            tuple(state[f"{i}.{j}"].to(t.device, t.dtype, copy=True) for j, t in enumerate(part)) for i, part in enumerate(self._state)
        )
