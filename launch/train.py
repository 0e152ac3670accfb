"""The one training program that every launcher starts:

launch/torchrun.sh --config configs/fsdp2.yaml --training.lr 0.001
"""

from __future__ import annotations

import atexit
import gc
import logging
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import distclip
import faults
from config import Config, Output, read
from data import make_data
from jobs import make_job
from ladder import Ladder
from refusal import Refused, is_first, said_once, say
from strategies import check


def rate(step: int, config: Config) -> float:
    """Linear warm-up, then cosine decay to 0, as a factor of the learning rate."""
    warmup, steps = config.training.warmup, config.training.steps
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def over_ranks(loss: Tensor | None, device: str) -> float:
    """Mean over the ranks that saw one. A collective."""
    seen = torch.tensor([0.0, 0.0] if loss is None else [loss.item(), 1.0], device=device)
    if dist.is_initialized():
        dist.all_reduce(seen)
    return float(seen[0] / seen[1])


def say_equal(what: str, mine: object) -> None:
    """Whether all ranks ended with the same. A collective."""
    states = [mine] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(states, mine)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(
            f"{what}, {'equal on all ranks' if all(state == states[0] for state in states) else f'NOT EQUAL: {states}'}"
        )


def train(config: Config, device: str) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    training, output = config.training, config.output
    batches = make_data(config.model, config.data.name, config.data.folder, config.data.seed)
    job = make_job(config, device)
    index, parts = job.part
    share = training.batch // parts
    if share * parts != training.batch or share % training.accumulate:
        raise Refused(
            f"training.batch={training.batch} does not divide by {parts} parts of the "
            f"batch x {training.accumulate} micro-steps"
        )
    for fault in config.injected:
        if fault.kind == "layer":
            faults.weight_of(job.model, fault.weight)
    if rank == 0:
        print(job.clipper.plan)
    start = job.resume(output.checkpoint) if output.checkpoint else 0
    if rank == 0:
        say_start(start, config)
    if start >= training.steps:
        return

    bits = torch.zeros((), dtype=torch.int64, device=device)
    ladder, step, taken = Ladder(config, job, rank == 0, start), start, 0
    with tqdm(
        total=training.steps, initial=start, disable=rank != 0, mininterval=0.5, ncols=80
    ) as bar:
        while step < training.steps:
            batch = ladder.batch_of(step)
            x, y = (
                t[index * share : (index + 1) * share].to(device)
                for t in batches(batch, training.batch)
            )
            for group in job.optimizer.param_groups:
                group["lr"] = training.lr * rate(step, config) * ladder.lr_factor(step)
            now = [f for f in config.injected if f.step <= batch < f.step + f.batches]
            x, y = faults.read_by(now, rank, x, y)
            # which data this rank reads: batches are drawn by their numbers
            job.note = {"batch": batch, "samples": [index * share, (index + 1) * share - 1]}
            with faults.in_model(now, rank, job.model):
                loss, report = job.step(x, y, faults.element_of(now, rank))
            taken += 1
            bits = bits * 31 + report.coefs.float().view(torch.int32).long().sum()
            if step % 20 == 0 or step == training.steps - 1:
                bar.set_postfix(
                    loss=f"{over_ranks(loss, device):.4f}", norm=f"{report.total_norm.item():.3g}"
                )
            before, step = step, ladder.heed(step, report)
            if (
                output.checkpoint
                and step > before  # not rolled back to what is saved
                and (step % output.every == 0 or step == training.steps)
            ):
                job.save(output.checkpoint, step)
            bar.update(step - bar.n)
    say_equal(
        f"bits of the coefficients of {taken} steps: {int(bits) & 0xFFFFFFFF:08x}",
        int(bits),
    )
    if job.scaler.is_enabled():
        say_equal(f"scaler: scale {job.scaler.get_scale():g}", job.scaler.state_dict())
    if rank == 0:
        say_end(output)


def say_start(start: int, config: Config) -> None:
    output, steps = config.output, config.training.steps
    if start >= steps:
        print(
            f"nothing to train: {output.checkpoint} holds a checkpoint of step {start}, and "
            f"training.steps={steps} is reached; raise "
            "--training.steps to go on, or name another --output.checkpoint to start anew"
        )
    elif start:
        print(
            f"resumed: {output.checkpoint} holds a checkpoint of step {start}; {steps - start} "
            f"of {steps} steps are left"
        )
    elif output.log and Path(output.log).exists():
        print(
            f"note: {output.log} is there already; the lines of this run come after those that "
            f"it has"
        )
    world = dist.get_world_size() if dist.is_initialized() else 1
    for inject in config.injected:
        if not (start <= inject.step < steps and inject.rank < world):
            print(
                f"note: nothing is injected: inject.step={inject.step} and "
                f"inject.rank={inject.rank}, and steps {start} to {steps - 1} are "
                f"taken by ranks 0 to {world - 1}"
            )


def say_end(output: Output) -> None:
    if output.checkpoint:
        print(f"checkpoint: {output.checkpoint}")
    if not output.log:
        print("log: none; --output.log FILE writes one")
    elif Path(output.log).exists():
        print(f"log: {output.log}; distclip report {output.log}")
    else:
        print(f"log: {output.log} could not be written; a warning above says why")


def say_interrupted(config: Config) -> None:
    """At Ctrl-C, which all ranks get: no traceback of each of them."""
    where = config.output.checkpoint
    goes_on = f"; the same line goes on from the latest checkpoint in {where}" if where else ""

    def end(number: int, frame: object) -> None:
        if is_first():
            print(f"\ntrain.py: ended by Ctrl-C{goes_on}", file=sys.stderr)
        sys.stdout.flush()
        os._exit(128 + number)  # at once: threads of collectives would wait for ranks that are gone

    signal.signal(signal.SIGINT, end)


def configured(arguments: Sequence[str]) -> Config:
    """Refused where it cannot be honoured."""
    with said_once():
        config = read(arguments)
    check(config.strategy, config.model, launched="RANK" in os.environ)
    return config


def run(config: Config) -> None:
    """Train on this rank, from the first collective to the last."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "RANK" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        train(config, device)
    finally:
        if dist.is_initialized():
            gc.collect()  # a model that outlives its process groups leaves work to their threads
            dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this rank, without the interpreter's own end: caches of torch (of device meshes) and of
    DeepSpeed hold process groups until then, and a thread of gloo that drops the last of its work
    under it asks for the interpreter's lock, gets an exit of its thread instead, and aborts."""
    atexit._run_exitfuncs()  # last lines of sinks
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0, or 2 where the configuration cannot be honoured."""
    try:
        config = configured(arguments)
        say_interrupted(config)
        run(config)
    except (Refused, distclip.ConfigError) as refused:
        return say(refused)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
