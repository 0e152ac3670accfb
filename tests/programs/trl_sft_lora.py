"""trl's SFTTrainer with a LoRA adapter of peft on a tiny Llama, in one process."""

import recorded  # first

# isort: split
import tempfile

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = {f"w{i}": i for i in range(61)} | {"<pad>": 61, "<eos>": 62, "<unk>": 63}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
texts = [" ".join(f"w{int(i) % 61}" for i in row) for row in recorded.tokens(200, 16)]
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
arguments = SFTConfig(
    output_dir=tempfile.mkdtemp(), max_steps=recorded.STEPS, per_device_train_batch_size=8,
    learning_rate=5e-2, max_grad_norm=0.05, logging_steps=1, save_strategy="no", report_to=[],
    use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, max_length=16,
    dataloader_pin_memory=False,
)  # fmt: skip
trainer = SFTTrainer(
    LlamaForCausalLM(config),
    args=arguments,
    train_dataset=Dataset.from_dict({"text": texts}),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
)
if recorded.DISTCLIP:
    from distclip.integrations.transformers import clip_with_distclip  # distclip

    clip_with_distclip(trainer)  # distclip
trainer.train()
logs = [log for log in trainer.state.log_history if "grad_norm" in log]
recorded.tell([log["loss"] for log in logs], [log["grad_norm"] for log in logs])
