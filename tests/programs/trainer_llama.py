"""transformers' Trainer, a tiny Llama from its config, DDP on two ranks, two accumulated batches."""

import recorded  # first

# isort: split
import tempfile

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

rows = recorded.tokens(320, 16)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(), max_steps=recorded.STEPS, per_device_train_batch_size=4,
    gradient_accumulation_steps=2, learning_rate=1e-2, max_grad_norm=0.5, logging_steps=1,
    save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=1,
    dataloader_pin_memory=False,
)  # fmt: skip
trainer = Trainer(
    LlamaForCausalLM(config),
    arguments,
    train_dataset=[{"input_ids": row, "labels": row} for row in rows],
)
if recorded.DISTCLIP:
    from distclip.integrations.transformers import clip_with_distclip  # distclip

    clip_with_distclip(trainer)  # distclip
trainer.train()
logs = [log for log in trainer.state.log_history if "grad_norm" in log]
recorded.tell([log["loss"] for log in logs], [log["grad_norm"] for log in logs])
