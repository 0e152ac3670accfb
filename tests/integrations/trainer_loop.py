"""A Trainer script with distclip's one line: torchrun ... trainer_loop.py STRATEGY. Prints one JSON line a rank."""

import gc
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer, TrainingArguments

import distclip
from distclip.integrations.transformers import clip_with_distclip
from problem import HUGE, TINY, clipped, data, net, off, oracle, whole
from problem import moved as largest_move

STRATEGY = sys.argv[1]
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
CONFIGS = Path(__file__).parents[2] / "configs"
ROWS = 8


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, labels):
        return {"loss": (self.net(x) - labels).square().mean()}


def reset(micro=1):
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    if STRATEGY.startswith("fsdp"):
        PartialState._reset_state()
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState(backend="gloo")
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # Accelerate shards on accelerators only
    if STRATEGY == "deepspeed":
        PartialState._reset_state()
        import deepspeed
        from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its C++ build takes minutes, and gloo does
        config = json.loads((CONFIGS / "deepspeed" / "zero2.json").read_text())
        own = {"gradient_clipping": "auto"}  # what Trainer wants: its max_grad_norm
        own |= {"train_micro_batch_size_per_gpu": ROWS // WORLD // micro, "gradient_accumulation_steps": micro}
        plugin = DeepSpeedPlugin(hf_ds_config=config | own)
        Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # by which TrainingArguments would make a second plugin


def arguments(folder, **more):
    if STRATEGY.startswith("fsdp"):
        version = int(STRATEGY[-1])
        config = {"version": version, "fsdp_transformer_layer_cls_to_wrap": ["Linear"]}
        if version == 1:
            config |= {"sync_module_states": False, "cpu_ram_efficient_loading": False, "use_orig_params": True}
        more |= {"fsdp": "full_shard", "fsdp_config": config}
        more |= {"accelerator_config": {"use_configured_state": True}}
    elif STRATEGY == "deepspeed":
        more |= {"accelerator_config": {"use_configured_state": True}}
    else:
        more |= {"use_cpu": True}
    more = {"per_device_train_batch_size": ROWS // WORLD, "max_steps": 1, "save_strategy": "no"} | more
    return TrainingArguments(
        output_dir=folder, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", logging_steps=1, report_to=[],
        disable_tqdm=True, dataloader_pin_memory=False, **more,
    )  # fmt: skip


def trained(folder, resume=None, policy=None, rows=ROWS, frozen="none", **more):
    reset(more.get("gradient_accumulation_steps", 1))
    model = Regression()
    for name, param in model.named_parameters():
        param.requires_grad_(not name.startswith(frozen))
    x, y = data(1, rows)
    records = [{"x": a, "labels": b} for a, b in zip(x, y)]
    trainer = Trainer(model, arguments(folder, **more), train_dataset=records)
    callback = clip_with_distclip(trainer, policy=policy)
    before = {n.removeprefix("net."): p.detach().double().clone() for n, p in model.named_parameters()}
    trainer.train(resume_from_checkpoint=resume)
    now = {n.removeprefix("net."): p for n, p in whole(trainer.model_wrapped).items()}
    return trainer, callback, before, now


def one_step(folder, max_norm, micro=1, frozen="none"):
    more = {"per_device_train_batch_size": ROWS // WORLD // micro, "gradient_accumulation_steps": micro} if micro > 1 else {}
    trainer, callback, before, now = trained(folder, max_grad_norm=max_norm, frozen=frozen, **more)
    grads, norm = oracle(net(), *data(1, ROWS), lambda n: not f"net.{n}".startswith(frozen))
    still = max([0.0, *(float((now[n] - before[n]).abs().max()) for n in now if f"net.{n}".startswith(frozen))])
    grads, now, before = ({n: t for n, t in all.items() if not f"net.{n}".startswith(frozen)} for all in (grads, now, before))
    logs = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)
    report = callback.clipper.last_report
    return {
        "off": off(now, before, clipped(grads, norm, max_norm or HUGE)),
        "norm": float(norm),
        "norm_off": abs(float(report.total_norm) / float(norm) - 1),
        "bits": float(report.total_norm).hex(),
        "calls": report.step,
        "moved": largest_move(now, before),
        "still": still,
        "logs": {key: logs.get(key) for key in ("grad_norm", "clip_coef", "clip_rate", "clip_skipped")},
    }


def resumed(folder):
    """An adaptive policy goes on where the checkpoint left it."""
    more = {"policy": distclip.AutoClip(window=16), "save_strategy": "steps", "save_steps": 2}
    _, straight, _, _ = trained(folder, max_steps=4, **more)
    _, again, _, _ = trained(folder, resume=f"{folder}/checkpoint-2", max_steps=4, **more)
    first, second = straight.clipper.state_dict(), again.clipper.state_dict()
    return {
        "step": int(second["step"]),
        "equal": all(torch.equal(first[k], second[k]) for k in first if isinstance(first[k], torch.Tensor)),
    }


def refused(folder):
    reset()
    trainer, texts = Trainer(Regression(), arguments(folder, max_grad_norm=0.0)), []
    for policy in (distclip.AutoClip(), None, None):
        try:
            clip_with_distclip(trainer, policy=policy)
        except ValueError as error:
            texts.append(str(error))
    return texts


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = [tempfile.mkdtemp() if RANK == 0 else None]
    reset()
    if WORLD > 1:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        dist.broadcast_object_list(folder)
    folder = folder[0]
    cases = {
        "clip": one_step(folder, 0.1),
        "tiny": one_step(folder, TINY),
        "huge": one_step(folder, HUGE),
        "zero": one_step(folder, 0.0),
    }
    cases |= {"accumulate": one_step(folder, 0.1, micro=2), "part": one_step(folder, 0.1, frozen="net.0")}
    if STRATEGY in ("single", "ddp"):
        cases |= {"resumed": resumed(folder), "refused": refused(folder)}
    print("RESULT " + json.dumps(cases), flush=True)
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


main()
