"""How long a small all-reduce takes: Hockney's model, time = alpha + bytes * beta for each message
between two ranks.

R. Hockney, "The communication challenge for MPP: Intel Paragon and Meiko CS-2", Parallel Computing
20 (1994). The all-reduce algorithms and their costs are those of R. Thakur, R. Rabenseifner, W.
Gropp, "Optimization of collective communication operations in MPICH", International Journal of High
Performance Computing Applications 19 (2005); the time of adding numbers up is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.on_ranks import in_turns
from benchmarks.records import Spread
from benchmarks.timing import Effort
from distclip.testing import World


@dataclass(frozen=True, slots=True)
class Link:
    """A network: seconds a message, seconds a byte, seconds that starting a collective costs, and
    where the numbers are from."""

    name: str
    alpha: float
    beta: float
    base: float
    source: str


# Assumptions, not measured here.
INFINIBAND = Link(
    "InfiniBand HDR, a port a rank (assumed)", 5.0e-6, 1 / 25e9, 6.8e-6,
    "assumptions: alpha = 5 us for one hop of a tree over the network and 6.8 us to start are "
    "constants of NCCL's own tuning model ("
    "src/graph/tuning, hwLat and baseLat, LL protocol); 1/beta = 25 GB/s is the line rate of 200 "
    "Gbit/s",
)  # fmt: skip


def ring(ranks: int, size: float, link: Link) -> float:
    return 2 * (ranks - 1) * link.alpha + 2 * (ranks - 1) / ranks * size * link.beta


def doubling(ranks: int, size: float, link: Link) -> float:
    """Recursive doubling."""
    return math.ceil(math.log2(ranks)) * (link.alpha + size * link.beta)


def halving(ranks: int, size: float, link: Link) -> float:
    """Rabenseifner's reduce-scatter by recursive halving, then an all-gather."""
    return 2 * math.ceil(math.log2(ranks)) * link.alpha + 2 * (ranks - 1) / ranks * size * link.beta


def best(ranks: int, size: float, link: Link) -> float:
    """Seconds of the fastest of the three; 0 for one rank."""
    return (
        link.base + min(f(ranks, size, link) for f in (ring, doubling, halving))
        if ranks > 1
        else 0.0
    )


def meshes(ranks: int) -> dict[str, tuple[int, ...]]:
    return {"1-D": (ranks,), "2-D": (ranks // 8, 8)}


def predictions(link: Link, extra: int, quick: bool) -> list[dict[str, Any]]:
    """distclip's one message of (groups + extra) float64 over all ranks; torch's N numbers, once a
    mesh dimension of more than one rank."""
    out: list[dict[str, Any]] = []
    for ranks in (64, 16_384) if quick else (8, 64, 512, 4096, 16_384):
        for tensors in (148, 1000, 10_000):
            entry: dict[str, Any] = {"link": link.name, "ranks": ranks, "tensors": tensors}
            entry["one"] = best(ranks, 8 * (1 + extra), link)
            entry["per_parameter"] = best(ranks, 8 * (tensors + extra), link)
            for mesh, sizes in meshes(ranks).items():
                entry[f"torch {mesh}"] = sum(best(n, 4 * tensors, link) for n in sizes if n > 1)
            out.append(entry)
    return out


def measured(quick: bool) -> tuple[Link, list[dict[str, Any]]]:
    """gloo on this machine: medians by size, and alpha and beta fitted to its ring."""
    samples: list[dict[str, Any]] = []
    effort = Effort(seconds=0.1, least=3, most=5) if quick else Effort(seconds=1.0, least=20)
    for ranks in (2,) if quick else (2, 4):
        with World(ranks) as world:
            for words in (
                (12, 1024, 1 << 17) if quick else (12, 148, 1024, 10_240, 1 << 17, 1 << 20)
            ):
                times = world.run(reduce_words, words, effort, timeout=120.0)[0]
                samples.append(
                    {"ranks": ranks, "bytes": 8 * words, "seconds": Spread.of(times).median}
                )
    return fit(samples), samples


def reduce_words(words: int, effort: Effort) -> list[float]:
    vector = torch.zeros(words, dtype=torch.float64)
    return in_turns({"message": lambda: dist.all_reduce(vector)}, effort)["wall"]["message"]


def fit(samples: Sequence[dict[str, Any]]) -> Link:
    """Least squares of relative errors: seconds = alpha * 2(W - 1) + beta * 2(W - 1)/W * bytes."""
    rows = [
        (2 * (s["ranks"] - 1), 2 * (s["ranks"] - 1) / s["ranks"] * s["bytes"], s["seconds"])
        for s in samples
    ]
    matrix = torch.tensor([(a / t, b / t) for a, b, t in rows], dtype=torch.float64)
    alpha, beta = (
        torch.linalg.lstsq(matrix, torch.ones(len(rows), 1, dtype=torch.float64))
        .solution.flatten()
        .tolist()
    )
    return Link(
        "gloo on this machine (measured)",
        max(alpha, 0.0),
        max(beta, 0.0),
        0.0,
        "least squares over the measured sizes, as a ring",
    )
