"""transformers' Trainer in one process with what changes its loop: noise on the embeddings (NEFTune),
a compiled model, checkpointed activations, a batch size that is found by running out of memory, and
train() twice; the second is what is compared."""

import recorded  # first

# isort: split
import tempfile

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


class Small(LlamaForCausalLM):
    """As on a device that has room for four rows."""

    def forward(self, input_ids=None, labels=None, **more):
        if len(input_ids) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return super().forward(input_ids=input_ids, labels=labels, **more)


rows = recorded.tokens(320, 16)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(), max_steps=recorded.STEPS, per_device_train_batch_size=8,
    learning_rate=1e-2, max_grad_norm=0.5, logging_steps=1, save_strategy="no", report_to=[],
    use_cpu=True, disable_tqdm=True, seed=1, dataloader_pin_memory=False, neftune_noise_alpha=5,
    torch_compile=True, torch_compile_backend="eager", gradient_checkpointing=True,
    auto_find_batch_size=True,
)  # fmt: skip
trainer = Trainer(
    Small(config), arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows]
)
if recorded.DISTCLIP:
    from distclip.integrations.transformers import clip_with_distclip  # distclip

    clip_with_distclip(trainer)  # distclip
trainer.train()
first = trainer.state.log_history
trainer.train()
assert trainer._train_batch_size <= 4, "memory never ran out"
logs = [log for log in trainer.state.log_history if "grad_norm" in log][-recorded.STEPS :]
assert logs != [log for log in first if "grad_norm" in log]
recorded.tell([log["loss"] for log in logs], [log["grad_norm"] for log in logs])
