"""Accelerate's loop with a tiny Bert classifier from its config: DDP on two ranks, accumulation and a
learning-rate schedule, as Accelerate's nlp_example has it."""

import recorded  # first

# isort: split
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
config = BertConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
model = BertForSequenceClassification(config)
rows = recorded.tokens(320, 12)
data = [{"input_ids": row, "labels": int(row[0]) % 2} for row in rows]
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
schedule = get_linear_schedule_with_warmup(optimizer, 5, 4 * recorded.STEPS)
model, optimizer, loader, schedule = accelerator.prepare(
    model, optimizer, DataLoader(data, batch_size=4), schedule
)
if recorded.DISTCLIP:
    from distclip.integrations.accelerate import prepare  # distclip

    prepare(accelerator, model, max_norm=0.5)  # distclip

losses, norms = [], []
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.5))
            losses.append(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    if len(norms) == recorded.STEPS:
        break
recorded.tell(losses, norms)
accelerator.end_training()
