"""`GradClipper`: wires the stages. It reads top to bottom like the picture in the README."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from distclip import versions
from distclip.apply import fused
from distclip.apply.gradients import Outcome, drop_step_grads
from distclip.decide.saving import Saved, loaded, saved
from distclip.decide.state import ClipperState
from distclip.errors import ConfigError, GradientError
from distclip.exchange.channel import Channel
from distclip.groups import Grouping, Watch
from distclip.measure.collect import GradOf, Grads
from distclip.measure.grad_placements import PartialReducer
from distclip.measure.local_sums import LocalMeasurement
from distclip.optimizers import OptimizerParams, check_optimizers, check_step_signatures, listed
from distclip.policies import Policy
from distclip.records import ClipReport
from distclip.report.writer import Sink, Writer
from distclip.request import Request
from distclip.setup.build_plan import Reading, read
from distclip.setup.options import Asked, OnNonfinite
from distclip.setup.parameters import Params
from distclip.setup.placement import ReplicaDeclarations, ReplicatedOver, Shared
from distclip.stages import prepare
from distclip.step import StepRunner
from distclip.torch_internals.grad_scaler import ScalerState


class GradClipper:
    """Clips the gradients of a model that is held by many ranks, the same way on each.

    Building one is a collective: on all ranks of `process_group`, after wrapping and sharding.

    Args:
        params: a module, a list of modules (the pipeline stages of this rank), (name, parameter)
            pairs, or parameters. What an optimizer steps beside them is told once, is not clipped,
            and must be finite unless inf and NaN are let through.
        max_norm: threshold of the global norm, in the gradients' unit; `math.inf` only measures.
            Exactly one of `max_norm` and `policy`.
        policy: what to do with the norm: `FixedNorm`, `FixedValue`, `Normalize`, or an object with
            `init` and `decide`.
        norm_type: p of the norm, 0 < p ≤ 8 or inf.
        groups: which parameters share a norm: None (all), `per_parameter()`, `per_layer(depth)`,
            `per_param_group(optimizer)` or `by_name({...})`.
        on_nonfinite: `skip` the step, `raise` NonFiniteError, or `propagate` the gradients as they
            are; alike on all ranks.
        process_group: None is the default group; `distclip.LOCAL` this process alone.
        replicated_over: name pattern → the group over which those parameters are copies, or
            `distclip.PRIVATE`.
        shared: tuples of names that are one parameter, tied across ranks.
        grad_of: where a parameter's gradient is, if not in `.grad`.
        drift_tolerance: how far copies may differ, relative to the total power sum; None does not
            look, and different parameters under one name that are taken for copies (see
            `replicated_over`) then go unseen.
        skip_limit: more bad steps in a row than this end in an error.
        watch: norms of further groupings, for the report alone: `Watch(per_layer(), every=100)`.
        fold: `auto` lets fused optimizers apply the coefficient in their own pass in `step`, where
            that is the same; `never` does not. On CUDA say `never` where optimizers of one call are
            fused on some ranks only: ranks must judge a step at the same call.
        partial_grads: DTensor gradients that hold unreduced partial sums (tensor parallelism
            without FSDP leaves some) are an error, or
            `reduce`: before each call they are redistributed to their parameters' placements, after
                a small message by which ranks agree
            on which they are. `.grad` is set to the reduced tensor, also by `measure` and `audit`,
            which otherwise touch nothing.
        sinks: where reports go, on the first rank of the group; other ranks never look at theirs,
            which may be None. Without any a skipped step is a RuntimeWarning, once a streak.

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
        fold: Literal["auto", "never"] = "auto",
        partial_grads: Literal["refuse", "reduce"] = "refuse",
        watch: Watch | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self._process_group, self._sinks = process_group, sinks
        self._asked = Asked(
            max_norm,
            policy,
            norm_type,
            groups,
            on_nonfinite,
            drift_tolerance,
            skip_limit,
            fold,
            watch,
            partial_grads,
            grad_of,
        )
        self._params = _lasting(params)
        self._declared = ReplicaDeclarations(
            dict(replicated_over or {}), tuple(tuple(names) for names in shared)
        )
        self._grad_of = grad_of
        self._writer = Writer(())
        self._decided: tuple[Request, Outcome] | None = None
        # of clip_, step or decide: for those who do not make these calls themselves
        self.last_report: ClipReport | None = None
        self.rebuild()
        if self._channel.rank == 0:
            versions.tell()

    # Set-up

    def rebuild(self, params: Params | None = None) -> None:
        """A collective: read the parameters anew and agree on a new plan, after parameters joined
        or were replaced, or the world changed.

        The policy's state stays if the groups do; else it starts anew.

        Args:
            params: in place of those that were passed before. A module knows what it holds now; a
                list of pairs or parameters does not.
        """
        params = self._params if params is None else _lasting(params)
        self._channel = Channel.over(self._process_group)
        self._writer.flush()
        reading = read(params, self._asked, self._declared, self._channel, self._sinks)
        self._writer = Writer(self._sinks if self._channel.rank == 0 else ())
        weakref.finalize(self, self._writer.flush)  # at the latest when the program ends
        self._adopt(reading)
        self._params = params

    def _adopt(self, reading: Reading) -> None:
        with torch.inference_mode(False):  # what is made here is written at every step
            self._now = now = prepare(reading, self._channel, self._grad_of, len(self._sinks or ()))
            old: ClipperState | None = getattr(self, "_memory", None)
            if old is not None and old.groups == now.plan.groups:
                self._memory = old.moved(now.mixers)
            else:
                self._memory = ClipperState(
                    now.plan.groups, now.first, now.mixers, 0 if old is None else old.step
                )
        self.plan = now.plan
        self._steps = StepRunner(self._channel, now, self._memory, self._writer)
        reduces = now.options.partial_grads == "reduce"
        self._partials = (
            PartialReducer(self._channel, now.members, now.plan.pieces, now.device)
            if reduces
            else None
        )

    # Each step

    # torch.compiler.disable, but without importing the compiler when distclip is imported
    @torch._disable_dynamo
    @torch.no_grad()
    def clip_(
        self,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        scaler: Any = None,
        grad_scale: float = 1.0,
    ) -> ClipReport:
        """Clip all gradients in place. After backward, before `optimizer.step()`; one all-reduce,
        on every rank.

        A step that is not finite is skipped by taking the gradients away (`.grad = None`), which
        every optimizer respects.

        Args:
            optimizer: one or several, whose gradients `scaler` scaled; all their gradients are
                taken away at a skipped step. A
                wrapper, or a container of several, is one: what `scaler.step` will be given.
            scaler: an enabled GradScaler: gradients are unscaled in the same multiply (unless
                `scaler.unscale_` was called) and the overflow that all ranks agreed on is recorded;
                `scaler.step(optimizer)` and `scaler.update()` follow as usual.
            grad_scale: a factor (1/tokens, 1/micro-batches) that is applied together with the
                coefficient; norms are after it.

        Raises:
            NonFiniteError, AgreementError, GradientError, ConfigError: on all ranks alike, before
                any gradient was touched.
        """
        call = self._call("clip_", listed(optimizer), scaler, grad_scale)
        outcome = self._run(call, may_wait=self._now.propagates)
        if outcome.known is not None and outcome.known.skip:
            drop_step_grads(call, self._reachable(call))
        elif call.problem is None:
            self._now.actor.act(call, outcome, frozenset())
        call.hands.tell(outcome.overflow, stepped=False)
        self._write(outcome.report)
        return outcome.report

    # torch.compiler.disable, but without importing the compiler when distclip is imported
    @torch._disable_dynamo
    @torch.no_grad()
    def step(
        self,
        *optimizers: Optimizer,
        scaler: Any = None,
        update_scaler: bool = True,
        grad_scale: float = 1.0,
    ) -> ClipReport:
        """Unscale, clip, step the optimizers, update the scaler; a step that is not finite moves
        nothing. One all-reduce.

        A fused SGD, Adam, AdamW or Adagrad whose parameters share one coefficient applies it in its
        own pass (`fold="never"`: never).

        Args:
            optimizers: stepped as they are passed, once each: a wrapper (Lookahead, a schedule) or
                a container of several by its own `step`. Only Accelerate's and Lightning's wrappers
                are looked through.
            scaler: an enabled GradScaler; unscaling is part of the same multiply, unless
                `scaler.unscale_` was called.
            update_scaler: call `scaler.update()` at the end; False where another clipper's step
                with this scaler follows.
            grad_scale: a factor (1/tokens, 1/micro-batches) that is applied together with the
                coefficient; norms are after it.

        Raises:
            ConfigError: no optimizer was passed, something else was, or one whose `step` needs an
                argument (clip in its closure); a scaler together with on_nonfinite="propagate" (it
                would never learn); a DistributedDataParallel module inside `join()`.
            NonFiniteError, AgreementError, GradientError: on all ranks alike, before anything was
                touched. With "propagate" on CUDA a fault is told one call late, and optimizers that
                do not fold have then taken that step.
        """
        call = self._call("step", optimizers, scaler, grad_scale)
        folding = self._folding(call)
        outcome = self._run(call, len(folding) == len(call.owned) or self._now.propagates)
        if call.problem is None and (outcome.known is None or not outcome.known.skip):
            self._now.actor.act(
                call, outcome, frozenset[int]().union(*(call.owned[k].pieces for k in folding))
            )
            for k, owned in enumerate(call.owned):
                # a framework's wrapper would ask the scaler again
                step = (owned.optimizer if call.hands.enabled else owned.given).step
                if k in folding:
                    factor = self._now.actor.folded_factor(
                        call, outcome, folding[k], bool(call.hands.scaled[k])
                    )
                    fused.step_folded(
                        owned.optimizer,
                        factor,
                        outcome.stop.float() if outcome.known is None else None,
                        step,
                    )
                else:
                    step()
        call.hands.tell(outcome.overflow, stepped=True)
        if call.hands.enabled and update_scaler:
            scaler.update()
        self._write(outcome.report)
        return outcome.report

    # torch.compiler.disable, but without importing the compiler when distclip is imported
    @torch._disable_dynamo
    @torch.no_grad()
    def decide(self, grad_scale: float = 1.0, rescaled: bool = False) -> ClipReport:
        """`clip_` up to the decision, for engines that own the step: no gradient is touched. One
        all-reduce, on every rank.

        The engine leaves the step out where `report.skipped`; else it passes what it steps to
        `apply_`.

        Args:
            grad_scale: 1 / the engine's loss scale, where gradients still carry it; norms are after
                it.
            rescaled: the engine lowers its loss scale after a step that is not finite: `raise` then
                waits for `skip_limit` in a row.

        Raises:
            NonFiniteError, AgreementError, GradientError, ConfigError: on all ranks alike.
        """
        call = replace(self._call("decide", grad_scale=grad_scale), patient=rescaled)
        outcome = self._run(call, may_wait=self._now.propagates)
        # not to keep gradients alive until the next step
        self._decided = call, replace(outcome, grads=Grads.none())
        self._applied = set[int]()
        self._write(outcome.report)
        return outcome.report

    @torch.no_grad()
    def apply_(self, params: Iterable[Tensor]) -> None:
        """What the last `decide` decided, on the gradients that these parameters have now; in
        place, sends nothing.

        Args:
            params: some or all of the clipper's; each once after a `decide`. `grad_of` is asked
                anew, so that the gradients may be other tensors than those that were measured
                (float32 copies of bf16 ones).

        Raises:
            ConfigError: nothing was decided, the step is to be left out, or a parameter was passed
                before.
        """
        if self._decided is None:
            raise ConfigError(
                "apply_() applies what decide() decided; call decide() first, on all ranks"
            )
        call, outcome = self._decided
        if outcome.known is not None and outcome.known.skip:
            raise ConfigError(
                f"step {self._memory.step} is to be left out (report.skipped); there "
                f"is nothing to apply"
            )
        asked = {id(param) for param in params}
        mine = [i for i, param in enumerate(self._now.members) if id(param) in asked]
        again = [self.plan.pieces[i].name for i in mine if i in self._applied]
        if again:
            raise ConfigError(
                f"apply_() got {again[0]} twice since decide() ({len(again)} in "
                f"all); it would be clipped twice"
            )
        self._applied.update(mine)
        self._now.actor.act(
            call, replace(outcome, grads=self._now.sensor.collector.some(mine)), frozenset()
        )

    # torch.compiler.disable, but without importing the compiler when distclip is imported
    @torch._disable_dynamo
    @torch.no_grad()
    def measure(self, of: Literal["grad", "param"] = "grad") -> ClipReport:
        """Norms only: nothing is touched, nothing skipped or counted, inf and NaN are reported. One
        all-reduce.

        The report's coefficients, thresholds and `norm_after` are what `clip_` would do; `clipped`
        and `skipped` are False.

        Args:
            of: `grad`, or `param` for the parameters themselves, in the same groups.

        Raises:
            AgreementError: copies are not equal; GradientError: what was found wrong on a rank.
        """
        if of not in ("grad", "param"):
            raise ConfigError(f"measure(of={of!r}): it is 'grad' or 'param'")
        return self._run(replace(self._call("measure"), of=of), may_wait=True).report

    @torch.no_grad()
    def audit(self) -> None:
        """A collective: AgreementError, naming parameters and ranks, if gradients that should be
        copies are not equal."""
        call = self._call("audit")
        outcome = self._run(call, may_wait=False)
        nothing = outcome.finite.new_zeros(0, dtype=torch.float64)
        self._now.judge.compare(
            LocalMeasurement(self._memory.step, call, outcome.grads, [], 0.0, nothing, nothing)
        )

    def _reachable(self, call: Request) -> list[Tensor]:
        """Parameters whose gradients can be taken away. GradientError, on all ranks alike, where
        they cannot.

        With `grad_of` this is a collective: a rank may have no gradients to take away.
        """
        if self._grad_of is None:
            return self._now.members
        gone = [p for p in self._now.members if self._grad_of(p) is not None]
        out_of_reach = not call.hands.enabled and any(p.grad is not self._grad_of(p) for p in gone)
        told = self._channel.gather_ints(
            torch.tensor([int(out_of_reach)], device="cpu"),
            self._now.device,
            "the question who can skip a step",
        )
        if told.any():
            raise GradientError(
                f"step {self._memory.step} is to be skipped, and clip_ cannot take away gradients "
                f"that grad_of finds elsewhere; "
                "use clipper.step(optimizer), which leaves the optimizer out"
            )
        return gone

    def _write(self, report: ClipReport) -> None:
        if not self._steps.capturing():
            self._writer.write(report, late=self._steps.may_wait)

    def _call(
        self,
        operation: str,
        optimizers: Sequence[Any] = (),
        scaler: Any = None,
        grad_scale: float = 1.0,
    ) -> Request:
        """What is wrong with the arguments is told once all ranks have met: it may be wrong on one
        of them alone."""
        propagates = self._now.options.on_nonfinite == "propagate"
        owned = tuple[OptimizerParams, ...]()
        problem: ConfigError | None = None
        hands: ScalerState | None = None
        try:
            if operation == "step" and not optimizers:
                raise ConfigError(
                    "step() was given no optimizer; pass those that hold the clipped "
                    "parameters, or use clip_()"
                )
            check_optimizers(operation, optimizers)
            owned = tuple(map(self._owned, optimizers))
            if operation == "step":
                check_step_signatures(owned)
            if not isinstance(grad_scale, (int, float)) or not 0 < grad_scale < math.inf:
                raise ConfigError(f"grad_scale={grad_scale!r} must be positive and finite")
            hands = ScalerState(scaler, optimizers, self._now.device)
            if hands.enabled and propagates:
                raise ConfigError(
                    "on_nonfinite='propagate' and an enabled scaler exclude each other: steps that "
                    "overflow must be skipped, else the "
                    "scaler never finds its scale; use 'skip'"
                )
        except ConfigError as error:
            problem = error
        except Exception as error:  # an argument that answers otherwise than its kind does
            problem = ConfigError(f"{operation}(): {type(error).__name__}: {error}")
            problem.__cause__ = error
        hands = hands or ScalerState(None, owned, self._now.device)
        return Request(
            operation,
            owned,
            hands,
            1.0 if problem else float(grad_scale),
            problem,
            guards=not propagates,
        )

    def _owned(self, optimizer: Any) -> OptimizerParams:
        owned = self._now.owners.of(optimizer)
        if self._grad_of is None:
            return owned
        params = (self._now.members[i] for i in owned.pieces)
        return replace(
            owned,
            hidden=tuple(p for p in params if p.grad is not None and self._grad_of(p) is None),
        )

    def _folding(self, call: Request) -> dict[int, int]:
        """Optimizer → the group whose coefficient it applies by itself."""
        if self._now.options.fold == "never" or self._grad_of is not None:
            return {}
        return {
            k: owned.group
            for k, owned in enumerate(call.owned)
            if owned.group is not None
            and owned.group not in self._now.clamped
            and fused.can_fold(owned.optimizer, self._now.alike[owned.group])
            and (not self._steps.may_wait or fused.skip_is_safe(owned.optimizer))
        }

    def _run(self, call: Request, may_wait: bool) -> Outcome:
        self._decided = None
        self._now.uneven.refuse(call.operation)
        if self._partials is not None:
            self._partials.reduce_(
                self._memory.step + 1, call.text, reduces=call.of == "grad" and call.problem is None
            )
        outcome = self._steps.run(call, may_wait)
        if not call.passive:
            self.last_report = outcome.report
        return outcome

    # State

    def state_dict(self) -> dict[str, Any]:
        """A flat record of tensors and strings: equal on all ranks, independent of world size and
        sharding. Loads with `weights_only`."""
        return saved(self._saved(), self._now.options, self._now.parts, self.plan.groups)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, on another world size or sharding too. Sends nothing.

        A rule's numbers (a threshold) may be others than the saved ones: the clipper's hold, with
        one RuntimeWarning.

        Raises:
            ConfigError: it was cut short, or belongs to another kind of policy, norm_type or other
                groups, or a number changed that the state's size depends on (AutoClip's window);
                nothing was taken over.
        """
        new = loaded(state, self.state_dict(), self._saved())
        self._now.judge.streak.length = new.bad_in_a_row
        self._memory.load(new.step, new.history, new.state)

    def _saved(self) -> Saved:
        return Saved(
            self._memory.step,
            self._now.judge.streak.length,
            self._memory.history,
            self._memory.state,
        )


def _lasting(params: Params) -> Params:
    """What can be read again by `rebuild`: a generator is listed, a module or a list is taken as it
    will be then."""
    return list(params) if isinstance(params, Iterator) else params
