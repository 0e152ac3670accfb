"""A Trainer script with distclip's one line: torchrun ... trainer_loop.py STRATEGY. Prints one JSON
line a rank."""

import gc
import json
import os
import shutil
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
        # Accelerate shards on accelerators only
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if STRATEGY == "deepspeed":
        PartialState._reset_state()
        import deepspeed
        from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

        # its C++ build takes minutes, and gloo does
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        config = json.loads((CONFIGS / "deepspeed" / "zero2.json").read_text())
        own = {"gradient_clipping": "auto"}  # what Trainer wants: its max_grad_norm
        own |= {
            "train_micro_batch_size_per_gpu": ROWS // WORLD // micro,
            "gradient_accumulation_steps": micro,
        }
        plugin = DeepSpeedPlugin(hf_ds_config=config | own)
        Accelerator(
            deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")]
        )
        # by which TrainingArguments would make a second plugin
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def arguments(folder, **more):
    if STRATEGY.startswith("fsdp"):
        version = int(STRATEGY[-1])
        config = {"version": version, "fsdp_transformer_layer_cls_to_wrap": ["Linear"]}
        if version == 1:
            config |= {
                "sync_module_states": False,
                "cpu_ram_efficient_loading": False,
                "use_orig_params": True,
            }
        more |= {"fsdp": "full_shard", "fsdp_config": config}
        more |= {"accelerator_config": {"use_configured_state": True}}
    elif STRATEGY == "deepspeed":
        more |= {"accelerator_config": {"use_configured_state": True}}
    else:
        more |= {"use_cpu": True}
    more = {
        "per_device_train_batch_size": ROWS // WORLD,
        "max_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1.0,
    } | more
    return TrainingArguments(
        output_dir=folder, optim="sgd", lr_scheduler_type="constant", logging_steps=1, report_to=[],
        disable_tqdm=True, dataloader_pin_memory=False, **more,
    )  # fmt: skip


def trained(folder, resume=None, policy=None, rows=ROWS, frozen="none", kind=Trainer, **more):
    reset(more.get("gradient_accumulation_steps", 1))
    model = Regression()
    for name, param in model.named_parameters():
        param.requires_grad_(not name.startswith(frozen))
    x, y = data(1, rows)
    records = [{"x": a, "labels": b} for a, b in zip(x, y)]
    trainer = kind(model, arguments(folder, **more), train_dataset=records)
    callback = clip_with_distclip(trainer, policy=policy)
    before = {
        n.removeprefix("net."): p.detach().double().clone() for n, p in model.named_parameters()
    }
    trainer.train(resume_from_checkpoint=resume)
    now = {n.removeprefix("net."): p for n, p in whole(trainer.model_wrapped).items()}
    return trainer, callback, before, now


def one_step(folder, max_norm, micro=1, frozen="none"):
    more = (
        {
            "per_device_train_batch_size": ROWS // WORLD // micro,
            "gradient_accumulation_steps": micro,
        }
        if micro > 1
        else {}
    )
    trainer, callback, before, now = trained(folder, max_grad_norm=max_norm, frozen=frozen, **more)
    grads, norm = oracle(net(), *data(1, ROWS), lambda n: not f"net.{n}".startswith(frozen))
    still = max(
        [
            0.0,
            *(
                float((now[n] - before[n]).abs().max())
                for n in now
                if f"net.{n}".startswith(frozen)
            ),
        ]
    )
    grads, now, before = (
        {n: t for n, t in all.items() if not f"net.{n}".startswith(frozen)}
        for all in (grads, now, before)
    )
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
        "logs": {
            key: logs.get(key) for key in ("grad_norm", "clip_coef", "clip_rate", "clip_skipped")
        },
    }


def resumed(folder):
    """An adaptive policy goes on where the checkpoint left it."""
    more = {"policy": distclip.AutoClip(window=16), "save_strategy": "steps", "save_steps": 2}
    _, straight, _, _ = trained(folder, max_steps=4, **more)
    _, again, _, _ = trained(folder, resume=f"{folder}/checkpoint-2", max_steps=4, **more)
    first, second = straight.clipper.state_dict(), again.clipper.state_dict()
    return {
        "step": int(second["step"]),
        "equal": all(
            torch.equal(first[k], second[k]) for k in first if isinstance(first[k], torch.Tensor)
        ),
    }


class Elsewhere(Trainer):
    """Its checkpoints are not in `args.output_dir`."""

    def _get_output_dir(self, trial):
        return self.args.output_dir + "/elsewhere"


class OwnFormat(Elsewhere):
    """Writes what it resumes from by itself."""

    def _save_checkpoint(self, model, trial):
        there = f"{self._get_output_dir(trial)}/own-{self.state.global_step}"
        self.save_model(there, _internal_call=True)
        if self.args.should_save:
            self.state.save_to_json(f"{there}/trainer_state.json")


def state_of(callback):
    """Counters and thresholds, without the 500 flags of the clip rate."""
    state = callback.clipper.state_dict()
    return {
        name: t.tolist()
        for name, t in state.items()
        if isinstance(t, torch.Tensor) and t.numel() < 100
    }


def on_rank_0(action):
    if RANK == 0:
        action()
    if WORLD > 1:
        dist.barrier()


def wherever_trainer_writes(folder):
    """Thresholds are those of the checkpoint that is named, though another run's lies where it
    might be guessed."""
    more = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    policy = distclip.AutoClip(window=16)
    _, other, _, _ = trained(f"{folder}/a", policy=policy, learning_rate=0.01, **more)
    out = {"another run's": state_of(other)}
    _, straight, _, _ = trained(f"{folder}/b", policy=policy, **more)
    out["straight"] = state_of(straight)

    def goes_on(name, resume, **more):
        _, callback, _, _ = trained(
            f"{folder}/a", resume=f"{folder}/{resume}", policy=policy, **more
        )
        out[name] = state_of(callback)

    on_rank_0(lambda: os.rename(f"{folder}/b/checkpoint-2", f"{folder}/b/best"))
    goes_on("renamed, and another output_dir", "b/best", **more)
    goes_on(
        "with Trainer's own way to restore callbacks",
        "b/best",
        restore_callback_states_from_checkpoint=True,
        **more,
    )
    for kind, name in ((Elsewhere, "elsewhere/checkpoint-2"), (OwnFormat, "elsewhere/own-2")):
        trained(f"{folder}/c", policy=policy, kind=kind, **more)
        # an own format has no optimizer: momentum is none here, so that the steps are the same
        goes_on(kind.__name__, f"c/{name}", kind=kind, **more)
        on_rank_0(lambda: shutil.rmtree(f"{folder}/c"))
    trained(f"{folder}/d", policy=policy, save_only_model=True, **more)
    goes_on("the model alone", "d/checkpoint-2", **more)
    return out


def without_a_state(folder):
    """What is said where the checkpoint was written without distclip, or its state is of another
    step."""
    texts, more = [], {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    trained(f"{folder}/e", policy=distclip.AutoClip(window=16), **more)

    def edit(change):
        file = Path(f"{folder}/e/checkpoint-2/trainer_state.json")
        told = json.loads(file.read_text())
        change(told["stateful_callbacks"])
        file.write_text(json.dumps(told))

    def of_another_step(kept):
        kept["DistclipState"]["attributes"]["step"] = 1

    for change in (of_another_step, lambda kept: kept.pop("DistclipState")):
        on_rank_0(lambda change=change: edit(change))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            _, callback, _, _ = trained(
                f"{folder}/e",
                resume=f"{folder}/e/checkpoint-2",
                policy=distclip.AutoClip(window=16),
                **more,
            )
        texts += [str(w.message) for w in seen if "distclip" in str(w.message)]
        texts.append(int(callback.clipper.state_dict()["step"]))
    return texts


def again(folder):
    """Two `train()` of one Trainer, and a third without the callback: each clipped once, by whom it
    should be."""
    trainer, callback, _, _ = trained(folder, max_grad_norm=0.1)
    out = {
        "own": ["clip_grad_norm_" in vars(trainer.accelerator)],
        "norms": [],
        "calls": [],
        "objects": [],
        "off": [],
    }

    def once_more():
        before = whole(trainer.model_wrapped)
        x, y = data(1, ROWS)
        plain = net()
        plain.load_state_dict({n.removeprefix("net."): t for n, t in before.items()})
        grads, norm = oracle(plain, x, y)
        trainer.train()
        wanted = {f"net.{n}": g for n, g in clipped(grads, norm, 0.1).items()}
        out["off"].append(off(whole(trainer.model_wrapped), before, wanted))
        out["norms"].append(
            [
                float(norm),
                next(e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e),
            ]
        )
        out["own"].append("clip_grad_norm_" in vars(trainer.accelerator))
        out["objects"].append(len(trainer.accelerator._custom_objects))

    once_more()
    out["calls"].append(callback.clipper.last_report.step)
    trainer.remove_callback(type(callback))
    once_more()
    out["calls"].append(callback.clipper.last_report.step)
    return out


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
    gc.freeze()  # no collection, and no search for objects, goes through what was imported
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
    cases |= {
        "accumulate": one_step(folder, 0.1, micro=2),
        "part": one_step(folder, 0.1, frozen="net.0"),
    }
    if STRATEGY in ("single", "ddp"):
        cases |= {
            "resumed": resumed(folder),
            "refused": refused(folder),
            "wherever": wherever_trainer_writes(folder),
        }
        cases |= {"without": without_a_state(folder), "again": again(folder)}
    print("RESULT " + json.dumps(cases), flush=True)
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


main()
