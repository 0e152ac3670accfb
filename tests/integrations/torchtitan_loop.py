"""torchtitan's packaged debug models with its own clipping and with distclip's one line: torchrun
... torchtitan_loop.py LAYOUT. Prints one JSON line a rank."""

import json
import math
import shutil
import sys
import tempfile

import torch
import torch.distributed as dist

import torchtitan_cpu  # before torchtitan

# isort: split
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.config.override import OverrideConfig
from torchtitan.trainer import Trainer

import distclip
from distclip.cli.doctor.torchtitan_job import StepRecorder
from distclip.integrations.torchtitan import clip_with_distclip, release

LAYOUT = sys.argv[1]
STEPS = 12
MAX_NORM = 0.5


def config(folder, **more):
    return torchtitan_cpu.debug_config(LAYOUT, folder, STEPS, MAX_NORM, **more)


class Recorder(StepRecorder):
    """Also what distclip adds to the log, the experts' biases, and the norm over all ranks."""

    def __init__(self, trainer, after_backward):
        super().__init__(trainer)
        self.after_backward = after_backward
        self.extra, self.exact, self.biases = [], [], []

    def see_gradients(self):
        if self.after_backward is not None:
            self.after_backward(self.trainer)
        super().see_gradients()
        self.exact.append(exact_norm(self.squares[-1]))
        self.biases.append(biases(self.trainer))

    def log(self, metrics, step):
        super().log(metrics, step)
        self.extra.append({k: v for k, v in metrics.items() if k.startswith("distclip/")})


def trained(attach=None, folder="", after_backward=None, **more):
    """What each step logged, how it ended, the trainer, and what `attach` gave."""
    trainer = config(folder, **more).build()
    given = None if attach is None else attach(trainer)
    recorder, ended = Recorder(trainer, after_backward), None
    try:
        trainer.train()
    except RuntimeError as error:
        ended = f"step {trainer.step}: {error}"
    trainer.close()
    recorder.biases.append(biases(trainer))
    names = ("losses", "norms", "extra", "exact", "biases")
    seen = {name: getattr(recorder, name) for name in names} | {"ended": ended}
    return seen, trainer, given


def biases(trainer):
    """Of the experts, which the optimizers container's hook moves."""
    return [
        buffer.tolist()
        for part in trainer.model_parts
        for name, buffer in part.named_buffers()
        if "expert_bias" in name
    ]


def exact_norm(squares):
    """Of whole gradients, each name once, over all ranks."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, squares)
    merged = {name: square for each in everyone for name, square in each.items()}
    return math.sqrt(sum(merged.values()))


def bits(trainer):
    """Of this rank's parameters."""
    local = [
        param.detach().to_local() if isinstance(param, DTensor) else param.detach()
        for part in trainer.model_parts
        for param in part.parameters()
    ]
    return torch.cat([each.reshape(-1) for each in local]).view(torch.int32).sum().item()


def at_step_5(do):
    def after_backward(trainer):
        if trainer.step == 5:
            do([param for part in trainer.model_parts for param in part.parameters()])

    return after_backward


@at_step_5
def inf_on_rank_1(params):
    if dist.get_rank() == 1:
        params[-1].grad.to_local().view(-1)[0] = math.inf


@at_step_5
def left_out(params):
    for param in params:
        param.grad = None


def steps():
    own, _, _ = trained()
    ours, trainer, clipper = trained(clip_with_distclip)
    calls = clipper.last_report.step
    release(trainer)
    restored = "train_step" not in vars(trainer) and "step" not in vars(trainer.optimizers)
    return {"own": own, "ours": ours, "calls": calls, "restored": restored}


def not_finite():
    """The original, the original with that step left out, and distclip."""
    own, _, _ = trained(after_backward=inf_on_rank_1)
    without, trainer, _ = trained(after_backward=left_out)
    bits_without = bits(trainer)
    ours, trainer, clipper = trained(clip_with_distclip, after_backward=inf_on_rank_1)
    culprits = list(clipper.last_report.culprits)
    skips = int(clipper.last_report.skips)
    return {
        "own": own, "without": without, "ours": ours, "culprits": culprits, "skips": skips,
        "bits": [bits_without, bits(trainer)],
    }  # fmt: skip


def resumed():
    """Steps 7 to 12 from a checkpoint, with a threshold that learns."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)

    def attach(trainer):
        return clip_with_distclip(trainer, policy=distclip.ZClip(warmup=4))

    def checkpoint(**more):
        return CheckpointManager.Config(
            enable=True, interval=6, last_save_model_only=False, keep_latest_k=0, **more
        )

    straight, _, clipper = trained(attach, folder[0], checkpoint=checkpoint())
    again, _, other = trained(attach, folder[0], checkpoint=checkpoint(load_step=6))
    states = [clipper.state_dict(), other.state_dict()]
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])
    first, second = ({name: str(value) for name, value in state.items()} for state in states)
    equal = first == second
    return {
        "straight": straight["losses"], "resumed": again["losses"], "equal": equal,
        "learned": len(states[0]), "step": other.last_report.step,
    }  # fmt: skip


def by_override():
    """The extension point of its own: nothing is called."""
    target = "distclip.integrations.torchtitan.clip"
    imports = OverrideConfig(imports=[(target, {"norm_type": 2.0})])
    ours, trainer, _ = trained(override=imports)
    return {"ours": ours, "attached": "train_step" in vars(trainer)}


def refused():
    texts = []

    def said(do):
        try:
            do()
        except distclip.ConfigError as error:
            texts.append(str(error))

    trainer = config("").build()
    clip_with_distclip(trainer)
    said(lambda: clip_with_distclip(trainer))
    release(trainer)
    said(lambda: clip_with_distclip(trainer, grad_of=lambda param: param.grad))

    clip_with_distclip(trainer)
    trainer.config.training.max_norm = 3.0
    said(lambda: trainer.train_step(iter(trainer.batch_generator(trainer.dataloader))))
    release(trainer)
    processor, trainer.metrics_processor = trainer.metrics_processor, object()
    said(lambda: clip_with_distclip(trainer))
    trainer.metrics_processor = processor
    step, Trainer.train_step = Trainer.train_step, lambda self, data_iterator: None
    said(lambda: clip_with_distclip(trainer))
    Trainer.train_step = step
    trainer.close()
    return texts


def main():
    answer = {"steps": steps()}
    if LAYOUT == "fsdp2":
        answer |= {
            "not_finite": not_finite(), "resumed": resumed(), "by_override": by_override(),
            "refused": refused(),
        }  # fmt: skip
    if LAYOUT == "moe_ep":
        answer["skipped"], _, _ = trained(clip_with_distclip, after_backward=inf_on_rank_1)
    for rank in range(dist.get_world_size()):  # in turn: the lines are long
        if rank == dist.get_rank():
            print(f"RESULT {json.dumps(answer)}", flush=True)
        dist.barrier()
    dist.destroy_process_group()


main()
