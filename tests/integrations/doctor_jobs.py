"""`distclip doctor --framework NAME` as it is, and where distclip's threshold is twice too large:
doctor_jobs.py cpu|gpu NAME... Prints one JSON line. With cpu, frameworks that ask for a GPU are
told that this machine's CPU is one."""

import json
import os
import sys
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from unittest.mock import patch

import torch.distributed as dist

import distclip
from distclip import integrations
from distclip.cli import main
from distclip.cli.doctor.frameworks import JOBS

DEVICE, *NAMES = sys.argv[1:]


def checked(name):
    with redirect_stdout(StringIO()) as out:
        code = main(["doctor", "--framework", name, "--json"])
    document = json.loads(out.getvalue())
    return {
        "code": code,
        "results": {check["name"]: check["result"] for check in document["checks"]},
        "seen": {check["name"]: check["seen"] for check in document["checks"]},
        "stopped": document["stopped"],
    }


def accelerate_loose():
    prepare = integrations.accelerate.prepare

    def loose(accelerator, model, max_norm):
        clipper = prepare(accelerator, model, max_norm=2 * max_norm)
        accelerator.clip_grad_norm_ = lambda parameters, max_norm: clipper.clip_().total_norm
        return clipper

    return patch.object(integrations.accelerate, "prepare", loose)


def megatron_loose():
    attach = integrations.megatron.attach

    def loose(optimizer, model, max_norm):
        return attach(optimizer, model, max_norm=2 * max_norm)

    return patch.object(integrations.megatron, "attach", loose)


def torchtitan_loose():
    clip_with_distclip = integrations.torchtitan.clip_with_distclip

    def loose(trainer):
        twice = distclip.FixedNorm(2 * trainer.config.training.max_norm)
        return clip_with_distclip(trainer, policy=twice)

    return patch.object(integrations.torchtitan, "clip_with_distclip", loose)


LOOSE = {
    "accelerate": accelerate_loose, "megatron": megatron_loose, "torchtitan": torchtitan_loose,
}  # fmt: skip


def disguise(name):
    if DEVICE == "gpu" or name not in ("megatron", "torchtitan"):
        return nullcontext()
    JOBS[name] = JOBS[name]._replace(lacking=str)
    if name == "megatron":
        from megatron_cases import on_cpu

        return on_cpu()
    import torchtitan_cpu  # noqa: F401  # for as long as this process lives

    return nullcontext()


def seen_of(name):
    with disguise(name):
        seen = {"right": checked(name)}
        before = dict(os.environ)  # with what importing a framework sets
        if name in LOOSE:
            with LOOSE[name]():
                seen["loose"] = checked(name)
    # what is left of a launcher's environment, and of its groups
    seen["left"] = sorted(os.environ.items() ^ before.items()) + [
        variable for variable in ("RANK", "WORLD_SIZE", "MASTER_PORT") if variable in os.environ
    ]
    seen["group"] = dist.is_initialized()
    return seen


print(f"RESULT {json.dumps({name: seen_of(name) for name in NAMES})}", flush=True)
