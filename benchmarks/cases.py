"""The cases by name, without importing what they need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    where: str  # module:function, called with (effort, kernels)
    line: str
    threads: int = 2
    by_kernels: bool = True  # False: the kernels make no difference that matters here


CASES = {
    "gpt2": Case(
        "single:gpt2",
        "GPT-2 124M's shapes, fp32 and bf16, idle and active; the share of the read bandwidth",
    ),
    "small": Case("single:small", "5,000 tensors of 1,000 elements"),
    "tiny": Case("single:tiny", "10, 100 and 1,000 tensors of 8 x 8: what a call costs", threads=1),
    "huge": Case("single:huge", "three tensors of 2^26 elements"),
    "scaler": Case("single:scaler", "GradScaler: unscale and clip in place, and the whole step"),
    "step": Case("single:step", "clip and a fused AdamW step"),
    "overhead": Case("single:overhead", "1,000 parameters of 8 elements: Python's share"),
    "training": Case("training:training", "backward and clip of a small GPT, an LSTM and an MLP"),
    "ddp": Case(
        "ranks:ddp",
        "DDP with 10, 100, 1,000 parameters on 2 and 4 ranks; the message's cost apart",
        threads=1,
    ),
    "fsdp1": Case("ranks:fsdp1", "FSDP1 against its own method", threads=1),
    "fsdp2": Case(
        "ranks:fsdp2", "FSDP2 against torch's function and torchtitan's recipe", threads=1
    ),
    "tp": Case("ranks:tp", "tensor parallel and FSDP2 together", threads=1),
    "groups": Case("grouping:groups", "1 to 10,000 groups, in one process and on 4 ranks"),
    "setup": Case(
        "setup:setup", "set-up and first call for 1,000 to 20,000 DTensors", by_kernels=False
    ),
    "watching": Case(
        "watching:watching",
        "each rank's own norm, and a step that is watched: what it costs to see more",
        threads=1,
    ),
    "memory": Case("memory:memory", "peak memory beside the gradients"),
    "accelerate": Case(
        "frameworks:accelerate",
        "accelerator.clip_grad_norm_ on 2 ranks",
        threads=1,
        by_kernels=False,
    ),
    "deepspeed": Case(
        "frameworks:deepspeed",
        "DeepSpeed ZeRO 2: engine.step() on 2 ranks",
        threads=1,
        by_kernels=False,
    ),
    "scale": Case(
        "scale:scale",
        "threaded worlds of 8 to 256 ranks; the message's model up to 16,384",
        threads=1,
        by_kernels=False,
    ),
}
