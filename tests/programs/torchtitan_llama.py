"""torchtitan's Trainer and its packaged Llama debug model, FSDP2 on two ranks."""

import recorded  # first

# isort: split
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "integrations"))
import torchtitan_cpu

losses, norms = [], []
trainer = torchtitan_cpu.debug_config("fsdp2", "", recorded.STEPS, max_norm=0.5).build()
if recorded.DISTCLIP:
    from distclip.integrations.torchtitan import clip_with_distclip  # distclip

    clip_with_distclip(trainer)  # distclip


class Logger:
    def log(self, metrics, step):
        losses.append(metrics["loss_metrics/global_avg_loss"])
        norms.append(metrics["grad_norm"])

    def close(self):
        pass


trainer.metrics_processor.logger = Logger()
trainer.train()
trainer.close()
recorded.tell(losses, norms)
