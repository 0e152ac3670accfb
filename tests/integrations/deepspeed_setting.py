"""DeepSpeed on the CPU, as the scripts beside it set it up."""

import gc

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param

# DeepSpeed collects garbage around each of its reports of memory, a quarter of a second each time
# that all imported modules are gone through
gc.freeze()
# its C++ build takes minutes, and gloo does
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# DeepSpeed offers fp16 on GPUs only; gloo and the CPU can
get_accelerator().is_fp16_supported = lambda: True
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def config_of(stage, dtype, micro=1, scale=None, clipping=0.0, **more):
    zero = {
        "stage": int(stage[0]),
        "reduce_bucket_size": 1000,
        "stage3_param_persistence_threshold": 8,
    }
    if "small" in stage:  # several sub-groups
        zero["sub_group_size"] = 40
    if "loose" in stage:
        zero["contiguous_gradients"] = False
    zero |= more
    if "offload" in stage:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    out = {
        "train_micro_batch_size_per_gpu": 4 // micro,
        "gradient_accumulation_steps": micro,
        "gradient_clipping": clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if dtype == "bf16":
        out["bf16"] = {"enabled": True}
        if "unchecked" in stage:
            out["bf16"]["check_grad_overflow"] = False
        if "immediate" in stage:
            out["bf16"]["immediate_grad_update"] = True
        if "fp32acc" in stage:
            out["data_types"] = {"grad_accum_dtype": "fp32"}
    if dtype == "fp16":
        out["fp16"] = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1} | (scale or {})
    return out


def masters_of(engine, stage):
    """Full float32 parameters by name, as the optimizer steps them."""
    out = {}
    for name, param in engine.module.named_parameters():
        if stage[0] == "0":
            wrapped = engine.optimizer
            groups = getattr(wrapped, "fp32_groups", None)
            if groups is not None:
                pairs = zip(wrapped.fp16_groups, groups)
                param = next(
                    m for lows, highs in pairs for low, m in zip(lows, highs) if low is param
                )
            elif hasattr(wrapped, "fp32_groups_flat"):
                for lows, flat in zip(wrapped.fp16_groups, wrapped.fp32_groups_flat):
                    sizes = [low.numel() for low in lows]
                    for low, part in zip(lows, flat.split(sizes)):
                        if low is param:
                            found = part.view(low.shape)
                param = found
            out[name] = param.detach().double().clone()
        else:
            out[name] = safe_get_full_fp32_param(param).detach().double().clone()
    return out


def change(before, after):
    return {n: before[n] - after[n] for n in before}


def loss_scale(engine, stage):
    return float(
        engine.optimizer.loss_scale
        if stage[0] != "0"
        else engine.optimizer.loss_scale_config.cur_scale
    )
