"""What torch keeps of a user's own reduction of gradients: it has no public way to ask for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from distclip.errors import ConfigError


def comm_hooks_of(ddp: Any) -> list[Callable[..., object]]:
    """The communication hooks of a DDP module: it takes one."""
    return [hook for hook, _ in ddp._comm_hooks]


def delayed_names(ddp: Any) -> list[str]:
    """Parameters that a DDP module reduces by itself, without any communication hook, because of
    `delay_all_reduce_named_params`."""
    delayed = set(map(id, getattr(ddp, "_delay_all_reduce_params", ())))
    return [name for name, param in ddp.module.named_parameters() if id(param) in delayed]


def reduce_scatters_of(fsdp: Any) -> list[Any]:
    """Of one FSDP2 unit (or none, where it has no parameters of its own), torch's reduce-scatter or
    the one that the user has set.

    Raises:
        ConfigError: this torch keeps it elsewhere.
    """
    try:
        return [group._reduce_scatter_comm for group in _param_groups_of(fsdp)]
    except AttributeError as error:
        raise ConfigError(
            f"RankNorms: this torch ({torch.__version__}) keeps FSDP2's communication in a way "
            f"unknown to distclip ({error}); leave rank_norms out"
        ) from error


def predivided_by(fsdp: Any, dtype: torch.dtype, ranks: int) -> float:
    """By what FSDP2 has divided gradients before its reduce-scatter, so that the sum of small
    floats does not overflow: by about the root of the number of ranks, and not at all in float32
    and bfloat16."""
    if dtype in (torch.float32, torch.bfloat16):
        return 1.0
    factor = _param_groups_of(fsdp)[0].gradient_divide_factor or float(ranks)
    divided = 1.0
    while factor % divided == 0 and factor / divided > divided:
        divided *= 2
    return divided


def _param_groups_of(fsdp: Any) -> list[Any]:
    state = fsdp._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    group = state._fsdp_param_group  # of releases that had one at most
    return [] if group is None else [group]
