"""transformers' Trainer on a Llama that `DistributedConfig` shards when it is loaded: FSDP2 × tensor
parallelism on four ranks."""

import recorded  # first

# isort: split
import os
import tempfile

import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
PartialState(backend="gloo")
# Accelerate allows these meshes on accelerators only
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
dist.broadcast_object_list(folder)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
if dist.get_rank() == 0:
    LlamaForCausalLM(config).save_pretrained(folder[0])
dist.barrier()
model = LlamaForCausalLM.from_pretrained(
    folder[0], distributed_config=DistributedConfig(tp_size=2, fsdp_size=2)
)
rows = recorded.tokens(320, 16)
arguments = TrainingArguments(
    output_dir=folder[0], max_steps=recorded.STEPS, per_device_train_batch_size=4,
    learning_rate=1e-2, max_grad_norm=0.5, logging_steps=1, save_strategy="no", report_to=[],
    accelerator_config={"use_configured_state": True}, disable_tqdm=True, seed=1,
    dataloader_pin_memory=False,
)  # fmt: skip
trainer = Trainer(
    model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows]
)
if recorded.DISTCLIP:
    from distclip.integrations.transformers import clip_with_distclip  # distclip

    clip_with_distclip(trainer, partial_grads="reduce")  # distclip
trainer.train()
logs = [log for log in trainer.state.log_history if "grad_norm" in log]
recorded.tell([log["loss"] for log in logs], [log["grad_norm"] for log in logs])
