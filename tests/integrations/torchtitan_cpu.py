"""torchtitan on this machine's CPU, with gloo and random tokens: imported before torchtitan.

torchtitan asks torch for an accelerator and reads its memory; on a CPU there is none to ask.
"""

import inspect
from dataclasses import dataclass
from types import SimpleNamespace

import torch

torch._utils._get_available_device_type = lambda: "cpu"
for _name, _answer in {
    "get_device_name": "CPU",
    "get_device_properties": SimpleNamespace(total_memory=1),
    "reset_peak_memory_stats": None,
    "empty_cache": None,
    "memory_stats": {},
}.items():
    setattr(torch.cpu, _name, lambda *_, answer=_answer: answer)

from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.distributed.pipelining.schedules import PipelineScheduleMulti  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.optimizer import default_adamw  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.config import ParallelismConfig, TrainingConfig  # noqa: E402
from torchtitan.config.configs import DebugConfig  # noqa: E402
from torchtitan.distributed import utils as dist_utils  # noqa: E402
from torchtitan.models.common.attention import (  # noqa: E402
    FlexAttention,
    ScaledDotProductAttention,
)
from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel  # noqa: E402
from torchtitan.models.llama3.config_registry import llama3_debugmodel  # noqa: E402

_set_factor = FSDPModule.set_gradient_divide_factor


def _set_factor_for_gloo(module, factor):
    """gloo cannot multiply while it sums, by which FSDP2 divides elsewhere."""
    _set_factor(module, factor)
    module.set_force_sum_reduction_for_comms(True)


FSDPModule.set_gradient_divide_factor = _set_factor_for_gloo
dist_utils.set_pg_timeouts = lambda **_: None  # names a device in a barrier

_step_whole_batch = PipelineScheduleMulti.step


def _step_microbatches(schedule, *args, kwarg_mbs=None, **options):
    """Microbatches that are split already, as torchtitan 0.3.0 passes them: torch has that from
    2.14 on."""
    if kwarg_mbs is None:
        return _step_whole_batch(schedule, *args, **options)
    for stage in schedule._stages:
        stage.has_backward = schedule._has_backward
        stage.clear_runtime_states()
    arg_mbs = options.pop("arg_mbs", None)
    return schedule._step_microbatches(arg_mbs, kwarg_mbs, **options)


if "arg_mbs" not in inspect.signature(_step_whole_batch).parameters:
    PipelineScheduleMulti.step = _step_microbatches


class RandomTokens(BaseDataLoader):
    """Each data-parallel rank's own tokens, the same in each run."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        vocabulary: int = 256

    def __init__(self, config, *, dp_world_size, dp_rank, seq_len, local_batch_size, **_):
        self.config, self.shape = config, (local_batch_size, seq_len)
        self.name = f"dp_rank_{dp_rank}"
        self.source = torch.Generator().manual_seed(100 + dp_rank)

    def __iter__(self):
        positions = torch.arange(self.shape[1]).expand(self.shape).contiguous()
        while True:
            rows, columns = self.shape
            tokens = torch.randint(
                self.config.vocabulary, (rows, columns + 1), generator=self.source
            )
            yield (
                {"input": tokens[:, :-1].contiguous(), "positions": positions},
                tokens[:, 1:].contiguous(),
            )

    def state_dict(self):
        return {self.name: self.source.get_state()}

    def load_state_dict(self, state):
        self.source.set_state(state[self.name])


class NoTokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, **_):
        pass

    def encode(self, *args, **kwargs):
        raise NotImplementedError

    def decode(self, *args, **kwargs):
        raise NotImplementedError

    def get_vocab_size(self):
        return 256


PARALLELISM = {
    "fsdp2": {},
    "fsdp2_tp": {"tensor_parallel_degree": 2},
    "tp": {"tensor_parallel_degree": 2, "data_parallel_shard_degree": 1},
    "pp_fsdp2": {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "Interleaved1F1B"},
    "moe_ep": {"expert_parallel_degree": 2},
}


def debug_config(layout, folder, steps, max_norm, **more):
    """The packaged debug model's, with random tokens and short sequences."""
    made = deepseek_v3_debugmodel() if layout.startswith("moe") else llama3_debugmodel()
    for _, _, parent, name in list(made.model_spec.model.traverse(FlexAttention.Config)):
        setattr(parent, name, ScaledDotProductAttention.Config())  # the others need an accelerator
    changes = {
        "dump_folder": folder,
        "tokenizer": NoTokenizer.Config(),
        "dataloader": RandomTokens.Config(),
        # a smaller rate for experts: a token that is routed otherwise is no rounding
        "optimizer": default_adamw(lr=1e-4 if layout.startswith("moe") else 3e-3),
        "training": TrainingConfig(
            local_batch_size=2,
            seq_len=16,
            steps=steps,
            max_norm=max_norm,
            mixed_precision_param="float32",
            disable_cuda_graphs=True,
        ),
        "parallelism": ParallelismConfig(spmd_backend="partial_dtensor", **PARALLELISM[layout]),
        "activation_checkpoint": None,
        "debug": DebugConfig(seed=1, enable_structured_logging=False),
    }
    for name, value in (changes | more).items():
        setattr(made, name, value)
    return made
