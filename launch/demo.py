"""Three trainings on the same data and seed: no clipping, norm clipping, value clipping. Started by
launch/demo.sh.

Temporal order with a plain recurrent network (Pascanu, Mikolov, Bengio 2013, section 4), at a
learning rate at which gradients explode.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import distclip
from data import temporal_order
from models import Recurrent

STEPS, BATCH, LR, SEED, TESTS = 800, 64, 0.03, 0, 2000
OUT = Path("runs/demo")


@dataclass
class Run:
    """What one training left: per step on this rank, and the test's result."""

    title: str
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    clipped: list[bool] = field(default_factory=list)
    bits: list[int] = field(default_factory=list)
    success: float = 0.0
    equal: bool = False


def train(title: str, log: str, **options: object) -> Run:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(SEED)
    model = DistributedDataParallel(Recurrent())
    optimizer = torch.optim.SGD(model.parameters(), LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    path = OUT / f"{log}.jsonl"
    path.unlink(missing_ok=True)
    clipper = distclip.GradClipper(model, sinks=[distclip.JSONLSink(path)], **options)
    batches, run = temporal_order(SEED), Run(title)
    for step in tqdm(
        range(STEPS), desc=title, disable=rank != 0, file=sys.stdout, mininterval=0.5, ncols=80
    ):
        x, y = (t.chunk(world)[rank] for t in batches(step, BATCH))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        report = clipper.step(optimizer)
        schedule.step()
        run.losses.append(loss.item())
        run.norms.append(report.total_norm.item())
        run.clipped.append(bool(report.clipped))
        run.bits.append(report.clip_coef.view(torch.int32).item())
    finish(run, model)
    return run


@torch.no_grad()
def finish(run: Run, model: torch.nn.Module) -> None:
    """Losses over all ranks, the test set, and whether all ranks had the same coefficient, bit for
    bit, at every step."""
    losses = torch.tensor(run.losses, dtype=torch.float64)
    dist.all_reduce(
        losses, op=dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM
    )
    run.losses = (losses / dist.get_world_size()).tolist()
    bits = torch.tensor(run.bits)
    everyone = [torch.empty_like(bits) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, bits)
    run.equal = all(torch.equal(bits, other) for other in everyone)
    x, y = temporal_order(SEED + 1)(0, TESTS)
    run.success = (model(x).argmax(-1) == y).double().mean().item()


def show(runs: list[Run]) -> None:
    table = Table(
        title=f"temporal order, {STEPS} steps, learning rate {LR}, {dist.get_world_size()} ranks"
    )
    heads = (
        "",
        "success",
        "final loss",
        "largest norm",
        "median norm",
        "clipped steps",
        "coefficient's bits equal on all ranks",
    )
    for head in heads:
        table.add_column(head, justify="left" if not head else "right")
    for run in runs:
        norms = sorted(n if math.isfinite(n) else math.inf for n in run.norms)
        table.add_row(
            run.title,
            f"{run.success:.1%}",
            f"{run.losses[-1]:.4f}",
            f"{norms[-1]:.3g}",
            f"{norms[len(norms) // 2]:.3g}",
            f"{sum(run.clipped) / STEPS:.0%}" if any(run.clipped) else "-",
            "yes" if run.equal else "NO",
        )
    console = Console(width=120)
    console.print(table)
    console.print(
        "Chance is 25 %. What this shows: clipping allows a far larger learning rate. Without it a "
        "smaller one also learns (1e-4).\n"
        "The numbers differ between machines, whose CPUs sum in other orders; chance, about 100 % "
        "and equal bits do not."
    )


def plot(runs: list[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(9, 6.5), sharex=True, layout="constrained")
    for run, color in zip(runs, ("#b2182b", "#2166ac", "#e08214")):
        axes[0].plot(run.losses, color=color, lw=1.2, label=run.title)
        axes[1].plot(run.norms, color=color, lw=0.8, label=run.title)
    axes[0].set(
        yscale="log",
        ylabel="training loss (nats)",
        title="One data set, one seed, three ways to clip",
    )
    axes[1].set(yscale="log", ylabel="gradient norm before clipping", xlabel="step")
    axes[0].axhline(math.log(4), color="gray", lw=0.8, ls=":", label="chance, ln 4")
    axes[0].set_ylim(1e-4, 1e3)  # without clipping the loss leaves this range at step 2
    axes[1].set_ylim(1e-3, 1e10)
    axes[0].legend(loc="upper right")
    for ax in axes:
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    dist.init_process_group("gloo")
    OUT.mkdir(parents=True, exist_ok=True)
    runs = [
        train("no clipping", "none", max_norm=math.inf, on_nonfinite="propagate"),
        train("norm 1.0", "norm", max_norm=1.0),
        train("value 0.01", "value", policy=distclip.FixedValue(0.01)),
    ]
    if dist.get_rank() == 0:
        show(runs)
        plot(runs, OUT / "curves.png")
        print(f"curves: {(OUT / 'curves.png').resolve()}\nlogs:   {OUT.resolve()}/*.jsonl")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
