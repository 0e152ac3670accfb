"""The oracle: each policy once more, from its paper, in float64 NumPy, one group and one step at a
time. Imports nothing of distclip.

`step(norms, total)` takes a step that is finite and gives (threshold, coefficient) of each group,
and whether it is skipped.
"""

import copy
import math

import numpy as np


def bounded(norm, threshold):
    return min(1.0, threshold / norm) if norm > 0 else 1.0


class PerGroup:
    """One `one(norm, total)` for each group."""

    def __init__(self, groups, **numbers):
        self.groups = [type(self).Group() for _ in range(groups)]
        for group in self.groups:
            vars(group).update(numbers)

    def step(self, norms, total):
        answers = [
            group.one(float(norm), float(total))
            for group, norm in zip(self.groups, norms, strict=True)
        ]
        return [a[0] for a in answers], [a[1] for a in answers], False


class AutoClip(PerGroup):
    """Seetharaman et al. 2020, algorithm 1."""

    class Group:
        def __init__(self):
            self.history = []

        def one(self, norm, total):
            if norm > 0:
                self.history.append(norm)
            c = (
                float(np.percentile(self.history[-self.window :], self.percentile))
                if self.history
                else math.inf
            )
            return c, bounded(norm, c)


class ZClip(PerGroup):
    """Kumar et al. 2025: z-score, reciprocal clipping; statistics of the clipped norm."""

    class Group:
        def __init__(self):
            self.buffer, self.mu, self.variance = [], 0.0, 0.0

        def one(self, norm, total):
            if len(self.buffer) < self.warmup:
                if norm > 0:
                    self.buffer.append(norm)
                    self.mu, self.variance = float(np.mean(self.buffer)), float(np.var(self.buffer))
                return self.max_norm, bounded(norm, self.max_norm)
            sigma = math.sqrt(self.variance)
            z = (norm - self.mu) / sigma
            clipped = self.mu + self.z_threshold**2 / z * sigma if z > self.z_threshold else norm
            shown = clipped if z > self.z_threshold else self.mu + self.z_threshold * sigma
            if norm > 0:
                self.mu = self.alpha * self.mu + (1 - self.alpha) * clipped
                self.variance = (
                    self.alpha * self.variance + (1 - self.alpha) * (clipped - self.mu) ** 2
                )
            return min(shown, self.max_norm), bounded(norm, min(clipped, self.max_norm))


class AdaGC(PerGroup):
    """Wang et al. 2025, algorithm 1, lines 5 to 17."""

    class Group:
        def __init__(self):
            self.t, self.gamma = 0, None

        def one(self, norm, total):
            if self.t < self.warmup:
                threshold, h = self.lambda_abs, bounded(total, self.lambda_abs)
                if norm > 0:
                    self.gamma = h * norm if self.gamma is None else min(self.gamma, h * norm)
            else:
                threshold = self.lambda_rel * self.gamma
                h = bounded(norm, threshold)
                if norm > 0:
                    self.gamma = self.beta * self.gamma + (1 - self.beta) * h * norm
            self.t += norm > 0
            return threshold, h


class Scheduled:
    def __init__(self, groups, at):
        self.t, self.at = 0, at

    def step(self, norms, total):
        c = float(self.at(self.t))
        self.t += 1
        return [c] * len(norms), [bounded(float(n), c) for n in norms], False


class Warmup:
    def __init__(self, inner, steps, max_norm):
        self.inner, self.left, self.max_norm = inner, steps, max_norm

    def step(self, norms, total):
        thresholds, coefs, skip = self.inner.step(norms, total)
        if self.left > 0:
            thresholds, coefs = (
                [self.max_norm] * len(norms),
                [bounded(float(n), self.max_norm) for n in norms],
            )
        self.left -= not skip
        return thresholds, coefs, skip


class SkipSpikes:
    """OLMo-core's rule over the norms of taken steps, and at least `factor` times their mean."""

    def __init__(self, inner, sigma, window, warmup, factor):
        self.inner, self.sigma, self.window, self.warmup, self.factor = (
            inner,
            sigma,
            window,
            warmup,
            factor,
        )
        self.norms = []

    def step(self, norms, total):
        norm = float(np.linalg.norm(norms))
        latest = self.norms[-self.window :]
        if len(latest) >= self.warmup:
            mean, std = np.mean(latest), np.std(latest, ddof=1)
            if norm > mean + self.sigma * std and norm > self.factor * mean:
                thresholds, coefs, _ = copy.deepcopy(self.inner).step(norms, total)
                return thresholds, coefs, True
        self.norms.append(norm)
        return self.inner.step(norms, total)


class Escalate:
    """Spikes by the median and MAD of the latest log-norms; three rungs that count them. `bad` takes
    a step that is not finite; `action` is what was said last."""

    def __init__(self, inner, rungs, window, sigma, factor, history, warmup):
        self.inner, self.rungs, self.window = inner, rungs, window
        self.sigma, self.factor, self.history, self.warmup = sigma, factor, history, warmup
        self.logs, self.t = [], 0
        self.bad_steps, self.since = [], {name: 0 for name in rungs}
        self.action = "none"

    def step(self, norms, total):
        norm = float(np.linalg.norm(norms))
        latest, known = self.logs[-self.history :], len(self.logs)
        inner = copy.deepcopy(self.inner)
        thresholds, coefs, left_out = inner.step(norms, total)
        spike = left_out
        if norm > 0:
            log = math.log(norm)
            if latest:
                middle = np.median(latest)
                spread = 1.4826 * np.median(np.abs(np.array(latest) - middle))
                high = log > middle + self.sigma * spread and norm > self.factor * math.exp(middle)
                spike = left_out or high
            self.logs.append(log)
        self._count(spike and known >= self.warmup)
        skip = left_out or (spike and bool({"skip", "roll_back"} & self.reached))
        if not skip:
            self.inner = inner
        return thresholds, coefs, skip

    def bad(self):
        self._count(len(self.logs) >= self.warmup)

    def _count(self, counts):
        self.t += 1
        self.reached, self.action = set(), "none"
        if not counts:
            return
        self.bad_steps.append(self.t)
        for name in ("skip", "lower_lr", "roll_back"):
            number = self.rungs.get(name)
            after = max(self.since[name], self.t - self.window) if number else 0
            if number and sum(bad > after for bad in self.bad_steps) >= number:
                self.reached.add(name)
                self.action = name
        if self.action == "lower_lr":
            self.since["lower_lr"] = self.t
        if self.action == "roll_back":
            self.since = dict.fromkeys(self.rungs, self.t)
