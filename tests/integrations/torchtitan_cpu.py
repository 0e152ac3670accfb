"""torchtitan on this machine's CPU, with gloo: imported before torchtitan.

torchtitan asks torch for an accelerator and reads its memory; on a CPU there is none to ask.
"""

import inspect
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
from torchtitan.components.optimizer import default_adamw  # noqa: E402
from torchtitan.distributed import utils as dist_utils  # noqa: E402
from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel  # noqa: E402
from torchtitan.models.llama3.config_registry import llama3_debugmodel  # noqa: E402

from distclip.cli.doctor.torchtitan_job import shortened  # noqa: E402

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


PARALLELISM = {
    "fsdp2": {},
    "fsdp2_tp": {"tensor_parallel_degree": 2},
    "tp": {"tensor_parallel_degree": 2, "data_parallel_shard_degree": 1},
    "pp_fsdp2": {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "Interleaved1F1B"},
    "moe_ep": {"expert_parallel_degree": 2},
}


def debug_config(layout, folder, steps, max_norm, **more):
    """The packaged debug model's, with random tokens and short sequences."""
    moe = layout.startswith("moe")
    made = shortened(
        deepseek_v3_debugmodel() if moe else llama3_debugmodel(),
        folder,
        steps=steps,
        max_norm=max_norm,
    )
    # a smaller rate for experts: a token that is routed otherwise is no rounding
    made.optimizer = default_adamw(lr=1e-4 if moe else 3e-3)
    for name, value in PARALLELISM[layout].items():
        setattr(made.parallelism, name, value)
    for name, value in more.items():
        setattr(made, name, value)
    return made
