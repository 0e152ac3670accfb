"""`GradClipper`: wires the stages. It reads top to bottom like the picture in the README."""

from __future__ import annotations

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
from distclip.apply.gradients import StepOutcome, drop_step_grads
from distclip.apply.second_step import SecondStepWatch
from distclip.decide.state import ClipperState
from distclip.errors import ConfigError, DistclipError, GradientError
from distclip.exchange.channel import Channel
from distclip.groups import Grouping, Watch
from distclip.measure.collect import GradOf
from distclip.measure.grad_placements import PartialReducer
from distclip.measure.rank_norms import RankNorms
from distclip.optimizers import as_optimizers
from distclip.passed import as_list
from distclip.policies import Policy
from distclip.policies.policy import shown
from distclip.policies.wrapping import num_observed
from distclip.records import ClipReport
from distclip.report.header import make_header
from distclip.report.writer import ReportWriter, SinkLike
from distclip.request import Request
from distclip.setup.build_plan import SetupInputs, build_plan
from distclip.setup.options import OnNonfinite, PassedOptions
from distclip.setup.parameters import Params
from distclip.setup.placement import ReplicatedOver, Shared
from distclip.stages import Stages, build_stages
from distclip.step import StepRunner
from distclip.torch_internals.compile import outside_graphs


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
            `per_param_group(optimizer)`, `by_name({...})` or `by_optimizer({...}, *optimizers)`.
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
        watch: norms of further groupings, for report and log alone: `Watch(per_layer())`,
            `Watch(per_expert("*.experts.*"))`.
        rank_norms: `RankNorms(model)`: each rank's own norm too, before the reduction.
        fold: `auto` lets fused optimizers apply the coefficient in their own pass in `step`, where
            that is the same; `never` does not. On CUDA say `never` where optimizers of one call are
            fused on some ranks only: such ranks would judge a step at different calls, which is an
            AgreementError.
        partial_grads: DTensor gradients that hold unreduced partial sums (tensor parallelism
            without FSDP leaves some) are an error, or `reduce`: before each call they are
            redistributed to their parameters' placements, after a small message by which ranks
            agree on which they are. `.grad` is set to the reduced tensor, also by `measure` and
            `audit`, which otherwise touch nothing.
        sinks: where reports go, on the first rank of the group: objects with `write(report)`, or
            functions of a report. Other ranks never look at theirs, which may be None. Without any
            a skipped step is a RuntimeWarning, once a streak.

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
        rank_norms: RankNorms | None = None,
        sinks: Sequence[SinkLike | None] = (),
    ) -> None:
        self._process_group, self._sinks = process_group, sinks
        self._passed = PassedOptions(
            max_norm=max_norm,
            policy=policy,
            norm_type=norm_type,
            groups=groups,
            on_nonfinite=on_nonfinite,
            drift_tolerance=drift_tolerance,
            skip_limit=skip_limit,
            fold=fold,
            watch=watch,
            partial_grads=partial_grads,
            grad_of=grad_of,
            rank_norms=rank_norms,
            replicated_over=replicated_over,
            shared=shared,
        )
        self._params = _reusable(params)
        self._grad_of = grad_of
        self._writer = ReportWriter()
        self._last_flush: Any = None
        self._decided: StepOutcome | None = None
        # whether all optimizers of the last step folded: a rank that passes none by mistake judges
        # that step at the call at which the others do
        self._all_fold = False
        # None where gradients are elsewhere, and once enough was seen
        self._second_step = SecondStepWatch() if grad_of is None else None
        # of clip_, step or decide, of one that raised too: for those who do not make these calls
        # themselves
        self.last_report: ClipReport | None = None
        self.rebuild()
        if self._channel.rank == 0:
            versions.log_untested_release()

    # Set-up

    def rebuild(self, params: Params | None = None) -> None:
        """A collective: read the parameters anew and agree on a new plan, after parameters joined
        or were replaced, or the world changed.

        The policy's state stays if the groups do; else it starts anew.

        Args:
            params: in place of those that were passed before. A module knows what it holds now; a
                list of pairs or parameters does not.

        Raises:
            ConfigError, PlacementError, AgreementError: as when a clipper is built. On CUDA also
                what the last step's own call would have raised, where steps are judged at the next.
        """
        params = self._params if params is None else _reusable(params)
        channel = Channel.from_group(self._process_group)
        runner: StepRunner | None = getattr(self, "_runner", None)
        if runner is not None:
            runner.finish(channel)
        self._channel = channel
        self._writer.flush()
        inputs = build_plan(params, self._passed, self._channel, self._sinks)
        if self._channel.rank == 0:
            header = make_header(inputs.plan, inputs.options, inputs.device)
            self._writer = ReportWriter(self._sinks, header)
        else:
            self._writer = ReportWriter()
        if self._last_flush is not None:
            self._last_flush.detach()  # it would keep the writer before
        # at the latest when the program ends
        self._last_flush = weakref.finalize(self, self._writer.flush)
        self._adopt(inputs)
        self._params = params

    def _adopt(self, inputs: SetupInputs) -> None:
        with torch.inference_mode(False):  # what is made here is written at every step
            stages = build_stages(
                inputs,
                self._channel,
                self._grad_of,
                len(self._writer.sinks),
                self._passed.rank_norms,
            )
            is_alone = self._channel.size == 1
            on_host = stages.on_host or stages.decides_on_host
            old: ClipperState | None = getattr(self, "_state", None)
            if old is not None and old.groups == stages.plan.groups:
                self._state = old.to(
                    stages.hash_weights,
                    stages.checker.streak,
                    stages.device,
                    on_host,
                    is_alone,
                )
            else:
                self._state = ClipperState(
                    groups=stages.plan.groups,
                    initial=stages.initial,
                    observed=[num_observed(each.policy) for each in stages.assignments],
                    hash_weights=stages.hash_weights,
                    streak=stages.checker.streak,
                    device=stages.device,
                    on_host=on_host,
                    is_alone=is_alone,
                    step=0 if old is None else old.step,
                )
        self._stages, self.plan = stages, stages.plan
        watch = stages.options.watch
        self._layers_every = 1 if watch is None else watch.every
        self._runner = StepRunner(self._channel, stages, self._state, self._writer)
        self._writer.window = stages.checker.window
        self._partials: PartialReducer | None = None
        if stages.options.partial_grads == "reduce":
            self._partials = PartialReducer(
                self._channel, inputs.members, stages.plan.pieces, stages.device
            )

    def __repr__(self) -> str:
        """One line: what the norm is held to, p, and what of the model is on this rank. Neither
        communicates nor reads on the host; answers where set-up failed, too."""
        passed: PassedOptions | None = getattr(self, "_passed", None)
        stages: Stages | None = getattr(self, "_stages", None)
        facts: list[str] = []
        if passed is not None:
            limit = f"max_norm={shown(passed.max_norm)}"
            if passed.policy is not None:
                limit = f"policy={shown(passed.policy)}"
            facts += [" ".join(limit.split()), f"norm_type={shown(passed.norm_type)}"]
        if stages is None:
            facts.append("not set up")
        else:
            pieces = stages.plan.pieces
            facts += [
                f"parameters={len(pieces)}",
                f"elements={sum(piece.local_numel for piece in pieces)}",
                f"ranks={len(stages.plan.ranks)}",
                f"kernels={stages.kernels}",
            ]
        return f"{type(self).__name__}({', '.join(facts)})"

    # Each step

    @outside_graphs
    def clip_(
        self,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        scaler: Any = None,
        grad_scale: float = 1.0,
        note: Any = None,
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
            note: something small of this rank that JSON can write (sample ids, file offsets, the
                loss), on some or all ranks. Sent, by one gather, and written only if this step or
                one of the next two matters (`ClipReport.matters`); 4 KiB a rank, what is more is
                cut.

        Raises:
            NonFiniteError, AgreementError, GradientError, ConfigError: on all ranks alike, before
                any gradient was touched.
        """
        optimizers = () if optimizer is None else as_optimizers(optimizer)
        request = self._stages.requests.make("clip_", optimizers, scaler, grad_scale, note=note)
        outcome = self._run(request, allow_late=self._stages.always_steps)
        if outcome.is_skipped:
            drop_step_grads(request, self._params_to_drop(outcome))
        elif request.error is None:
            self._stages.applier.apply_(outcome)
        if request.scaler.enabled:
            request.scaler.record_found_inf(outcome.status.found_inf, stepped=False)
        self._write(outcome)
        return outcome.report

    @outside_graphs
    def step(
        self,
        *optimizers: Optimizer,
        scaler: Any = None,
        update_scaler: bool = True,
        grad_scale: float = 1.0,
        note: Any = None,
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
            note: something small of this rank that JSON can write (sample ids, file offsets, the
                loss), on some or all ranks. Sent, by one gather, and written only if this step or
                one of the next two matters (`ClipReport.matters`); 4 KiB a rank, what is more is
                cut.

        Raises:
            ConfigError: no optimizer was passed, something else was, or one whose `step` needs an
                argument (clip in its closure); a scaler together with on_nonfinite="propagate" (it
                would never learn); a DistributedDataParallel module inside `join()`.
            NonFiniteError, AgreementError, GradientError: on all ranks alike, before anything was
                touched. With "propagate" on CUDA a fault is told one call late, and optimizers that
                do not fold have then taken that step.
        """
        request = self._stages.requests.make(
            "step", optimizers, scaler, grad_scale, note=note, update_scaler=update_scaler
        )
        if self._second_step is not None:
            self._second_step = self._second_step.end()
        fused_groups = self._fused_groups(request)
        if request.optimizers:
            self._all_fold = len(fused_groups) == len(request.optimizers)
        outcome = self._run(request, allow_late=self._all_fold or self._stages.always_steps)
        if request.error is None and not outcome.is_skipped:
            self._step_optimizers(outcome, fused_groups)
        if request.scaler.enabled:
            request.scaler.record_found_inf(outcome.status.found_inf, stepped=True)
            if update_scaler:
                scaler.update()
        self._write(outcome)
        if self._second_step is not None:
            self._second_step.begin(self._stages.inputs.members, request, outcome.is_skipped)
        return outcome.report

    def _step_optimizers(self, outcome: StepOutcome, fused_groups: dict[int, int]) -> None:
        """Clip what no optimizer clips by itself, and step them all."""
        request, applier = outcome.request, self._stages.applier
        pieces = (request.optimizers[k].pieces for k in fused_groups)
        applier.apply_(outcome, frozenset[int]().union(*pieces))
        stop = applier.fused_stop(outcome)
        for k, owned in enumerate(request.optimizers):
            # a framework's wrapper would ask the scaler again
            step = (owned.optimizer if request.scaler.enabled else owned.given).step
            if k in fused_groups:
                scaled = bool(request.scaler.is_scaled[k])
                divisor = applier.fused_divisor(outcome, fused_groups[k], scaled)
                fused.step_fused(owned.optimizer, divisor, stop, step)
            else:
                step()

    @outside_graphs
    def decide(
        self, grad_scale: float = 1.0, dynamic_loss_scale: bool = False, note: Any = None
    ) -> ClipReport:
        """`clip_` up to the decision, for engines that own the step: no gradient is touched. One
        all-reduce, on every rank.

        The engine leaves the step out where `report.skipped`; else it passes what it steps to
        `apply_`.

        Args:
            grad_scale: 1 / the engine's loss scale, where gradients still carry it; norms are after
                it.
            dynamic_loss_scale: the engine lowers its loss scale after a step that is not finite:
                `raise` then waits for `skip_limit` in a row.
            note: as for `clip_`.

        Raises:
            NonFiniteError, AgreementError, GradientError, ConfigError: on all ranks alike.
        """
        request = self._stages.requests.make(
            "decide", grad_scale=grad_scale, note=note, dynamic_loss_scale=dynamic_loss_scale
        )
        request = replace(request, tolerate_backoff=dynamic_loss_scale)
        outcome = self._run(request, allow_late=self._stages.always_steps)
        # not to keep gradients alive until the next step
        self._decided = outcome._replace(grads=None)
        self._applied = set[int]()
        self._write(outcome)
        return outcome.report

    @outside_graphs
    def apply_(self, params: Iterable[Tensor]) -> None:
        """What the last `decide` decided, on the gradients that these parameters have now; in
        place, sends nothing.

        Args:
            params: some or all of the clipper's; each once after a `decide`. `grad_of` is asked
                anew, so that the gradients may be other tensors than those that were measured
                (float32 copies of bf16 ones).

        Raises:
            ConfigError: nothing was decided, the step is to be left out, a parameter was passed
                before, or something else than parameters.
        """
        if self._decided is None:
            raise ConfigError(
                "apply_() applies what decide() decided; call decide() first, on all ranks"
            )
        if self._decided.is_skipped:
            raise ConfigError(
                f"step {self._state.step} is to be left out (report.skipped); there is nothing to "
                "apply"
            )
        asked = {id(param) for param in _as_tensors(params)}
        members = self._stages.inputs.members
        mine = [i for i, param in enumerate(members) if id(param) in asked]
        again = [self.plan.pieces[i].name for i in mine if i in self._applied]
        if again:
            raise ConfigError(
                f"apply_() got {again[0]} twice since decide() ({len(again)} in all); it would be "
                "clipped twice"
            )
        self._applied.update(mine)
        grad_set, grads = self._stages.measurer.collector.collect_subset(mine)
        self._stages.applier.apply_(self._decided._replace(grad_set=grad_set, grads=grads))

    @outside_graphs
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
        request = self._stages.requests.make("measure", of=of)
        return self._run(request, allow_late=True).report

    @outside_graphs
    def audit(self) -> None:
        """A collective: AgreementError, naming parameters and ranks, if gradients that should be
        copies are not equal. inf and NaN equal their own kind, at the same places."""
        request = self._stages.requests.make("audit")
        outcome = self._run(request, allow_late=False)
        checker, step = self._stages.checker, self._state.step
        try:
            checker.compare_replicas(request, step, outcome.grad_set, outcome.grads)
        except DistclipError as error:
            del outcome  # the error's frames would hold the gradients
            raise error.with_traceback(None) from None

    def _params_to_drop(self, outcome: StepOutcome) -> list[Tensor]:
        """Parameters whose `.grad` can be set to None. GradientError, on all ranks alike and once
        the report is written, where that does not skip a step.

        With `grad_of` this is a collective: a rank may have no gradients.
        """
        members, grad_of = self._stages.inputs.members, self._grad_of
        if grad_of is None:
            return members
        request = outcome.request
        gone = [param for param in members if grad_of(param) is not None]
        out_of_reach = not request.scaler.enabled and any(p.grad is not grad_of(p) for p in gone)
        told = self._channel.gather_ints(
            torch.tensor([int(out_of_reach)], device="cpu"),
            self._stages.device,
            "the question who can skip a step",
        )
        if told.any():
            text = (
                f"step {self._state.step} is to be skipped, and clip_ cannot take away gradients "
                "that grad_of finds elsewhere; use clipper.step(optimizer), which leaves the "
                "optimizer out"
            )
            error = self._channel.tell_once(GradientError(text))
            self.last_report = outcome.report.ended(type(error).__name__)
            try:
                raise error
            except GradientError:
                self._write(outcome._replace(report=self.last_report, error=error))
                raise
            finally:
                del error  # its traceback holds this frame
        return gone

    def _write(self, outcome: StepOutcome) -> None:
        if self._writer.sinks and not self._runner.is_capturing:
            self._writer.write(
                outcome.report,
                # after an error no call may follow
                late=not self._state.on_host and outcome.error is None,
                judged=outcome.status.judged,
                layers_due=self._state.num_steps % self._layers_every == 0,
            )

    def _fused_groups(self, request: Request) -> dict[int, int]:
        """Optimizer → the group whose coefficient it applies by itself."""
        stages = self._stages
        if stages.options.fold == "never" or self._grad_of is not None:
            return {}
        return {
            k: owned.group
            for k, owned in enumerate(request.optimizers)
            if owned.group is not None
            and owned.group not in stages.clamped
            and fused.can_fold(owned.optimizer, stages.requests.index.ids_by_group[owned.group])
            and (not self._runner.reads_late or fused.skip_is_safe(owned.optimizer))
        }

    def _run(self, request: Request, allow_late: bool) -> StepOutcome:
        self._decided = None
        if self._stages.inputs.join is not None:
            self._stages.inputs.join.refuse_join(request.operation)
        if self._partials is not None:
            reduces = request.target == "grad" and request.error is None
            self._partials.reduce_partial_(self._state.step + 1, request.description, reduces)
        outcome = self._runner.run(request, allow_late)
        if not request.read_only:
            self.last_report = outcome.report
        if outcome.error is not None:
            try:
                raise outcome.error
            except DistclipError:
                self._write(outcome)  # an interrupt here has the step's error as its context
                raise
            finally:
                del outcome  # the error's traceback would hold it, and it the error
        return outcome

    # State

    def state_dict(self) -> dict[str, Any]:
        """A flat record of tensors and strings: equal on all ranks, independent of world size and
        sharding. Loads with `weights_only`."""
        return self._state.state_dict(self._stages.options, self._stages.assignments)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, on another world size or sharding too. Sends nothing.

        A rule's numbers (a threshold) may be others than the saved ones: the clipper's hold, with
        one RuntimeWarning.

        Raises:
            ConfigError: it was cut short, or belongs to another kind of policy, norm_type or other
                groups, or a number changed that the state's size depends on (AutoClip's window);
                nothing was taken over.
        """
        self._state.load_state_dict(state, self.state_dict())


def _as_tensors(params: Any) -> list[Tensor]:
    """What `apply_` was given. ConfigError for anything but tensors."""
    given = [params] if isinstance(params, Tensor) else as_list(params)
    for thing in [params] if given is None else given:
        if not isinstance(thing, Tensor):
            raise ConfigError(
                f"apply_() got a {type(thing).__name__}; pass some or all of the clipper's "
                "parameters"
            )
    return given or []


def _reusable(params: Params) -> Params:
    """What can be read again by `rebuild`: a generator is listed, a module or a list is taken as it
    will be then."""
    return list(params) if isinstance(params, Iterator) else params
