"""A ladder of actions for steps that go wrong again and again."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distclip.errors import ConfigError
from distclip.passed import as_number
from distclip.policies.policy import Policy, describe
from distclip.policies.spikes import norm_over_groups
from distclip.policies.wrapping import check_policy, inner_state, pass_on_stats, wrap_state
from distclip.records import ACTIONS, Clamp, Norms, Scale, UnitScale

_NUM_OWN = 5  # tensors of its own state


@dataclass(frozen=True, repr=False)
class Escalate:
    """Counts spikes and steps that are not finite, and says in `report.action` what to do about
    them: "none", "skip", "lower_lr" or "roll_back", equal on all ranks. `policy` decides how the
    steps are clipped.

    A step is a *spike* if `policy` leaves it out, or if its norm |g| (over the groups that this
    policy governs) has log|g| > m + sigma · 1.4826 · MAD and |g| > factor · exp(m), with m the
    median and MAD the median absolute deviation of log|g| over the last `history` steps that were
    finite, taken or not. So spikes do not hide spikes, and norms that have risen for good become
    usual after half that many steps. Nothing counts before `warmup` such norms are known, so that a
    loss scale may be looked for first; later overflows of a loss scale count.

    Each rung counts the spikes and bad steps among the last `window` steps, this one included, and
    is reached at such a step if there are as many as its number:

    * `skip`: spikes are left out, as by `SkipSpikes`, for as long as there are so many.
    * `lower_lr`: said once, for the loop to lower the learning rate for a while. From the next step
      on it counts anew, so that it is said again only after as many more.
    * `roll_back`: said once, for the loop to load an earlier checkpoint and to leave out the data
      since then; the step is left out. After it everything is counted anew.

    The highest rung that is reached is the step's action. The ladder steps down by itself: what
    lies more than `window` steps back does not count. Where `roll_back` loads the clipper's state
    too, counts are those of the checkpoint. With `on_nonfinite="propagate"` a step that is not
    finite counts and is taken; its action is never "skip".

    Tracks raw norms and what `policy` tracks, and sends what `policy` sends. Its counts change at
    every step; the statistics of `policy` at steps that are taken. It stands outermost:
    `Escalate(Warmup(...))`. `report.action` is read on the host.

    Args:
        policy: what happens to the steps.
        skip, lower_lr, roll_back: how many; None leaves a rung out. They do not fall.
        window: over how many steps they are counted, at 8 bytes each.
        sigma, factor, history, warmup: of the rule above; `history` takes 8 bytes for each norm.

    Raises:
        ConfigError: an argument out of range; `policy` holds an Escalate.
    """

    policy: Policy
    skip: int | None = 1
    lower_lr: int | None = 3
    roll_back: int | None = 6
    window: int = 100
    sigma: float = 6.0
    factor: float = 2.0
    history: int = 128
    warmup: int = 32

    # so many tensors of its state, the first, are kept at steps that are not taken too
    num_observed = _NUM_OWN

    def __post_init__(self) -> None:
        check_policy("Escalate", self.policy)
        rungs = [number for number in self._rungs() if number is not None]
        if (
            not rungs
            or not all(type(number) is int and number >= 1 for number in rungs)
            or sorted(rungs) != rungs
        ):
            raise ConfigError(
                f"Escalate: skip={self.skip!r}, lower_lr={self.lower_lr!r}, "
                f"roll_back={self.roll_back!r}; they count bad steps, from 1, do not fall, and "
                f"one of them at least is a number"
            )
        if not isinstance(self.window, int) or self.window < rungs[-1]:
            raise ConfigError(
                f"Escalate: window={self.window!r} must be a whole number of at least "
                f"{rungs[-1]}, the highest rung; it counts steps"
            )
        sigma, factor = as_number(self.sigma), as_number(self.factor)
        if not 0 < sigma < math.inf or not 1 <= factor < math.inf:
            raise ConfigError(
                f"Escalate: sigma={self.sigma!r} must be positive and factor={self.factor!r} at "
                f"least 1, both finite"
            )
        if not isinstance(self.history, int) or not isinstance(self.warmup, int):
            raise ConfigError(
                f"Escalate: history={self.history!r} and warmup={self.warmup!r} count norms"
            )
        if not 2 <= self.warmup <= self.history:
            raise ConfigError(
                f"Escalate: warmup={self.warmup} must be from 2 to history={self.history}"
            )
        pass_on_stats(self, self.policy)

    def _rungs(self) -> tuple[int | None, int | None, int | None]:
        return self.skip, self.lower_lr, self.roll_back

    def __repr__(self) -> str:
        rungs = f"skip={self.skip}, lower_lr={self.lower_lr}, roll_back={self.roll_back}"
        rule = (
            f"window={self.window}, sigma={self.sigma}, factor={self.factor}, "
            f"history={self.history}, warmup={self.warmup}"
        )
        return f"Escalate({describe(self.policy)}, {rungs}, {rule})"

    def init(self, groups: int, device: torch.device) -> tuple[Tensor, ...]:
        whole = torch.zeros((), dtype=torch.int64, device=device)
        own = (
            # the logarithms of the latest norms, written round and round, and how many there were
            torch.zeros(self.history, dtype=torch.float64, device=device),
            whole,
            # by step: the number of one that was bad, from 1, else 0; round and round
            torch.zeros(self.window, dtype=torch.int64, device=device),
            whole.clone(),  # steps
            # the steps of the last lower_lr and roll_back
            torch.zeros(2, dtype=torch.int64, device=device),
        )
        inner = self.policy.init(groups, device)
        return wrap_state(own, inner, inner)

    def decide(
        self, norms: Norms, state: tuple[Tensor, ...]
    ) -> tuple[Scale | Clamp | UnitScale, tuple[Tensor, ...]]:
        logs, seen, bad_steps, steps, said = state[:_NUM_OWN]
        own = inner_state(state, _NUM_OWN)
        answer, new = self.policy.decide(norms, own)
        left_out = torch.zeros_like(norms.finite) if answer.skip is None else answer.skip.any()

        # Is it a spike?
        norm = norm_over_groups(norms)
        log = norm.log()
        usual = norms.finite & log.isfinite()
        place = torch.arange(self.history, device=norm.device)
        filled = seen.clamp(max=self.history)
        middle = _median(logs, filled, place)
        spread = 1.4826 * _median((logs - middle).abs(), filled, place)
        outlier = usual & (log > middle + self.sigma * spread)
        outlier = outlier & (log > middle + math.log(self.factor))
        spike = norms.finite & (outlier | left_out)
        bad = (spike | ~norms.finite) & (seen >= self.warmup)
        logs = torch.where((place == seen % self.history) & usual, log, logs)

        # How many there are, and which rung that is
        now = steps + 1
        here = torch.arange(self.window, device=norm.device) == steps % self.window
        bad_steps = torch.where(here, torch.where(bad, now, 0), bad_steps)
        since_roll_back = (bad_steps > said[1]).sum()
        counts = since_roll_back, (bad_steps > said.amax()).sum(), since_roll_back
        reached = [
            bad & (count >= number) if number is not None else torch.zeros_like(bad)
            for count, number in zip(counts, self._rungs(), strict=True)
        ]
        action = torch.zeros_like(steps)
        for i, rung in enumerate(reached):
            action = torch.where(rung, i + 1, action)
        said = torch.where(
            torch.stack([action == ACTIONS.index(name) for name in _SAID]), now, said
        )

        skip = answer.skip
        if self.skip is not None or self.roll_back is not None:
            skip = left_out | (spike & (reached[0] | reached[2]))
        admitted = norms.finite if skip is None else norms.finite & ~skip.any()
        inner = tuple(torch.where(admitted, n, o) for n, o in zip(new, own, strict=True))
        observed = (logs, seen + usual, bad_steps, now, said)
        return replace(answer, skip=skip, action=action), wrap_state(observed, own, inner)


_SAID = ("lower_lr", "roll_back")


def _median(values: Tensor, filled: Tensor, place: Tensor) -> Tensor:
    """[]: of the first `filled` values; the mean of the two in the middle. Some number where there
    is none."""
    ordered = values.masked_fill(place >= filled, math.inf).sort().values
    last = (filled - 1).clamp(min=0)
    pair = torch.stack([last // 2, (last + 1) // 2])
    return ordered.gather(0, pair).mean()
