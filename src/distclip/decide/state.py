"""What a clipper remembers from step to step: equal on all ranks, independent of world size and
sharding.

Where the host reads at once, counters are Python's numbers. On a device they are tensors that are
written in place, so that the replays of a captured graph find there what the one before left.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import mul
from typing import Any

import torch
from torch import Tensor

from distclip.decide.decision import ClipDecision, StepStatus
from distclip.decide.guard import WINDOW, SkipStreak
from distclip.decide.rule_changes import RuleChange, describe_changes, rule_changes
from distclip.decide.warn import user_stacklevel
from distclip.errors import ConfigError
from distclip.kernels import kernels_for
from distclip.kernels.step_kernels import StepRecorder
from distclip.p_norm import bits_of
from distclip.policies.assignment import PolicyAssignment, describe_assignments
from distclip.policies.policy import describe
from distclip.policies.state import State, select_state, state_to
from distclip.setup.options import ClipOptions
from distclip.values import Flag, Number


class _FlagRing:
    """WINDOW flags, written round and round: in one memory, as Python's bytes and as a tensor."""

    def __init__(self, device: torch.device, on_host: bool) -> None:
        self._bytes = bytearray(WINDOW)
        self.flags = torch.zeros(WINDOW, dtype=torch.bool, device=device)
        self._on_host = on_host
        if on_host:
            self.flags = torch.frombuffer(self._bytes, dtype=torch.bool)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has one memory too, of its own."""
        return _FlagRing._from_flags, (self.flags.clone(), self._on_host)

    @classmethod
    def _from_flags(cls, flags: Tensor, on_host: bool) -> _FlagRing:
        ring = cls(flags.device, on_host)
        ring.flags.copy_(flags)
        return ring

    def exchange(self, turn: Any, flag: Any) -> Number:
        """Put the flag of a turn in its place: 1 where one was there before, else 0."""
        if isinstance(turn, Tensor):
            place = (turn % WINDOW).reshape(1)
            before = self.flags.index_select(0, place).reshape(()).double()
            self.flags.index_copy_(0, place, flag.reshape(1))
            return before
        place = turn % WINDOW
        before = self._bytes[place]
        self._bytes[place] = bool(flag)
        return before


class StepHistory:
    """How often the last steps were clipped, and how many were skipped.

    Attributes:
        num_calls, num_skips: int, or [] int64: calls that were to take a step, those that took
            none: one that ends in an error counts among both, whenever it is judged.
        clip_rate: float, or [] float64: share of the last steps, up to WINDOW, that were clipped;
            0 before the first.
    """

    def __init__(self, device: torch.device, on_host: bool) -> None:
        zero: Any = 0 if on_host else torch.zeros((), dtype=torch.int64, device=device)
        self._ring = _FlagRing(device, on_host)
        self.num_calls, self.num_skips = zero, zero if on_host else zero.clone()
        self._num_clipped: Any = 0.0 if on_host else zero.double()
        self.clip_rate: Any = 0.0 if on_host else zero.double()
        self._told: tuple[Tensor, Tensor] | None = None  # by a kernel, at the last step

    def record_by(
        self,
        recorder: StepRecorder,
        decision: ClipDecision,
        status: StepStatus,
        last_hash: Tensor,
    ) -> None:
        """`record`, and the decision's hash, on the device in one launch."""
        flags: Any = status.clipped, status.skipped
        columns: Any = decision.coef, decision.threshold
        counters: Any = self.num_calls, self.num_skips, self._num_clipped, self.clip_rate
        self._told = recorder.record(flags, columns, counters, self._ring.flags, last_hash)

    def take_latest(self) -> tuple[Number, Number]:
        """The clip rate and the skips as they are, which no later step writes to."""
        told, self._told = self._told, None
        rate, skips = told or (self.clip_rate, self.num_skips)
        if told is None and isinstance(rate, Tensor) and isinstance(skips, Tensor):
            rate, skips = rate.clone(), skips.clone()
        return rate, skips

    def record(self, clipped: Flag, skipped: Flag) -> None:
        """One more step."""
        # times 1.0: a bool tensor cannot be subtracted from
        self._num_clipped += clipped * 1.0 - self._ring.exchange(self.num_calls, clipped)
        self.num_calls += 1
        self.num_skips += skipped
        self._set_rate()

    def _set_rate(self) -> None:
        calls: Any = self.num_calls
        if isinstance(calls, Tensor):
            torch.div(self._num_clipped, calls.clamp(min=1, max=WINDOW), out=self.clip_rate)
        else:
            self.clip_rate = self._num_clipped / min(max(calls, 1), WINDOW)

    def tensors(self) -> dict[str, Tensor]:
        """Copies, as a checkpoint has them: `clipped` [WINDOW] bool, `calls` and `skips` int64."""
        calls, skips = (
            n.clone() if isinstance(n, Tensor) else torch.tensor(n, device="cpu")
            for n in (self.num_calls, self.num_skips)
        )
        return {"clipped": self._ring.flags.clone(), "calls": calls, "skips": skips}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """What `tensors` gave, perhaps on another device."""
        self._told = None
        self._ring.flags.copy_(saved["clipped"])
        numbers = saved["calls"], saved["skips"], saved["clipped"].sum(dtype=torch.float64)
        own: Any = self.num_calls, self.num_skips, self._num_clipped
        if isinstance(self.num_calls, Tensor):
            for number, value in zip(own, numbers):
                number.copy_(value)
        else:
            self.num_calls, self.num_skips, self._num_clipped = (n.item() for n in numbers)
        self._set_rate()


class ClipperState:
    """Equal on all ranks.

    Args:
        groups: the names that the state belongs to.
        initial: the policies' states at the start.
        observed: of each so many tensors, the first, are kept at steps that are not taken too.
        hash_weights: [2][groups] whole numbers, of the decision's hash.
        streak: of steps that were not taken.
        device: where gradients are measured, and counters stand that are not on the host.
        on_host: counters are Python's numbers, to begin with.
        is_alone: there is no other rank whose decisions could differ.
        step: calls so far.

    Attributes:
        last_hash: 16 bits of the last decision; on a device [] float64, written in place.
        on_host: as it is now.
    """

    def __init__(
        self,
        groups: tuple[str, ...],
        initial: State,
        observed: Sequence[int],
        hash_weights: Sequence[Sequence[int]],
        streak: SkipStreak,
        device: torch.device,
        on_host: bool,
        is_alone: bool,
        step: int = 0,
    ) -> None:
        self.groups, self.policies, self.step, self.streak = groups, initial, step, streak
        self._is_alone, self._observed = is_alone, tuple(observed)
        self.num_steps = 0  # calls that `history` counts: all that are not read-only
        self.on_host = on_host
        self._host_weights = [weight for row in hash_weights for weight in row]
        self._weights = torch.tensor(hash_weights, dtype=torch.int64, device=device)
        # both kinds are made at set-up: inside a captured graph none could be
        self._history_there = StepHistory(device, on_host=False)
        self.history = StepHistory(device, on_host) if on_host else self._history_there
        self._hash_there = torch.zeros((), dtype=torch.float64, device=device)
        # None: torch's operations do it
        self._recorder = _recorder_for(None if is_alone else self._weights, device)
        self.last_hash: Any = 0 if on_host else self._hash_there

    def to(
        self,
        hash_weights: Sequence[Sequence[int]],
        streak: SkipStreak,
        device: torch.device,
        on_host: bool,
        is_alone: bool,
    ) -> ClipperState:
        """The same for a new plan of the same groups, perhaps on another device."""
        policies = state_to(self.policies, device)
        streak.length = self.streak.length
        there = ClipperState(
            self.groups,
            policies,
            self._observed,
            hash_weights,
            streak,
            device,
            on_host,
            is_alone,
            self.step,
        )
        there.history.load(self.history.tensors())
        there.num_steps = self.num_steps
        return there

    def move_to_device(self) -> None:
        """Counters become tensors there. Copies to the device, but none before the first step."""
        assert self.on_host
        if self.history.num_calls:
            self._history_there.load(self.history.tensors())
            self._hash_there.fill_(self.last_hash)
        self.history, self.last_hash, self.on_host = self._history_there, self._hash_there, False

    def update(self, decision: ClipDecision, policies: State, status: StepStatus) -> None:
        """One more step that is not read-only.

        Args:
            policies: their next states; they stay where the step is not taken.
        """
        self.num_steps += 1
        if self._recorder is not None and not self.on_host:
            self.history.record_by(self._recorder, decision, status, self.last_hash)
        else:
            self.history.record(status.clipped, status.skipped)
            if not self._is_alone:
                token = self._hash_of(decision)
                if isinstance(self.last_hash, Tensor):
                    self.last_hash.copy_(token)
                else:
                    self.last_hash = token
        if any(policies):
            self._keep(select_state(status.taken, self.policies, policies, self._observed))

    def _hash_of(self, decision: ClipDecision) -> Any:
        """16 bits that depend on every bit of the coefficients and thresholds."""
        coef, threshold = decision.coef, decision.threshold
        if isinstance(coef, Tensor) and isinstance(threshold, Tensor):
            both = torch.stack([coef, threshold]).view(torch.int64)
            total: Any = (both * self._weights).sum()
            total = total if isinstance(self.last_hash, Tensor) else int(total)
        else:
            assert not isinstance(coef, Tensor) and not isinstance(threshold, Tensor)
            total = sum(map(mul, bits_of([*coef, *threshold]), self._host_weights))
        return total >> 40 & 0xFFFF  # bits that depend on all below them

    def _keep(self, policies: State) -> None:
        for tensor, value in zip(
            chain.from_iterable(self.policies), chain.from_iterable(policies), strict=True
        ):
            tensor.copy_(value)

    # Checkpoints

    def state_dict(
        self, options: ClipOptions, assignments: Sequence[PolicyAssignment]
    ) -> dict[str, Any]:
        """A flat record of tensors and strings, which loads with `weights_only`."""
        numbers = {"step": self.step, "bad_in_a_row": self.streak.length}
        return {
            **{name: torch.tensor(value, device="cpu") for name, value in numbers.items()},
            "policy": describe(options.policy),
            "groups": "\n".join(self.groups),
            "norm_type": repr(options.norm_type),
            # which policy has which groups: the main one alone does not say it
            "rules": describe_assignments(assignments, self.groups),
            **{f"history.{name}": tensor for name, tensor in self.history.tensors().items()},
            **{
                f"{i}.{j}": tensor.clone()
                for i, state in enumerate(self.policies)
                for j, tensor in enumerate(state)
            },
        }

    def load_state_dict(self, given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, as it fits a clipper that would give `own`.

        The numbers of a rule may differ: those of the clipper hold, which one RuntimeWarning says.

        Raises:
            ConfigError: it was cut short, or belongs to another kind of policy, another norm_type
                or other groups; or a number differs that the size of the state depends on. Nothing
                was taken over.
        """
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"load_state_dict() was given a {type(given).__name__}; pass what state_dict() "
                "gave, or a checkpoint's copy of it"
            )
        changes = _checked_record(given, own)
        if changes:
            warnings.warn(
                f"{describe_changes(changes)}: the new number holds from the next step on, and "
                "steps and statistics go on from the checkpoint. If that is meant there is nothing "
                "to do; to start the statistics anew, resume without the clipper's state",
                RuntimeWarning,
                stacklevel=user_stacklevel(),
            )
        self.step, self.streak.length = int(given["step"]), int(given["bad_in_a_row"])
        self.history.load({name: given[f"history.{name}"] for name in self.history.tensors()})
        self.num_steps = int(given["history.calls"])
        self._keep(
            tuple(
                tuple(given[f"{i}.{j}"].to(tensor.dtype) for j, tensor in enumerate(state))
                for i, state in enumerate(self.policies)
            )
        )


def _recorder_for(hash_weights: Tensor | None, device: torch.device) -> StepRecorder | None:
    has_kernel = kernels_for((torch.float64,), device) == "triton"
    return StepRecorder(hash_weights, WINDOW, device) if has_kernel else None


def _checked_record(given: Mapping[str, Any], own: Mapping[str, Any]) -> list[RuleChange]:
    """Rules with other numbers. ConfigError where the record fits in no other way."""
    changes: list[RuleChange] = []
    for name in [name for name, value in own.items() if isinstance(value, str) and name in given]:
        found = rule_changes(name, given[name], own[name])
        if found is None:
            raise ConfigError(
                f"the checkpoint's {name} is {given[name]!r}, this clipper's {own[name]!r}; build "
                "it as the saved one was"
            )
        changes += found
    lost = sorted(own.keys() - given.keys())
    if lost:
        raise ConfigError(
            f"the checkpoint of the clipper lacks {', '.join(lost)}; it was cut short, or saved by "
            "something else"
        )
    surplus = sorted(map(str, given.keys() - own.keys()))
    if surplus:
        raise ConfigError(
            f"the checkpoint of the clipper has {', '.join(surplus)}, this clipper has not; build "
            "it as the saved one was"
        )
    for name in [name for name, value in own.items() if isinstance(value, Tensor)]:
        value, wanted = given[name], tuple(own[name].shape)
        if isinstance(value, Tensor) and tuple(value.shape) == wanted:
            continue
        seen = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if changes and not name.startswith("history."):
            raise ConfigError(
                f"{describe_changes(changes)}, and this number cannot change at resume: the "
                f"checkpoint's {name} is {seen}, this clipper's {wanted}. Build it with the saved "
                "number, or resume without the clipper's state to start it anew"
            )
        raise ConfigError(
            f"the checkpoint's {name} is {seen}, not a tensor of shape {wanted}; was it cut short?"
        )
    return changes
