"""Where a rank's own gradients can be seen right before they are reduced: DDP's communication hook,
and the reduce-scatter of FSDP2. Sends nothing by itself."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distclip.errors import ConfigError
from distclip.setup.parameters import Params, modules_in, strip_wrappers
from distclip.setup.steps_in_backward import check_comm_hook
from distclip.torch_internals.dtensor import imported_class, is_dtensor
from distclip.torch_internals.reductions import (
    comm_hooks_of,
    delayed_names,
    predivided_by,
    reduce_scatters_of,
)

# (which reduction, this rank's gradients, by what they were divided)
See: TypeAlias = Callable[[Hashable, Tensor, float], None]
CommHook: TypeAlias = tuple[Any, Callable[[Any, Any], Any]]  # its state, the hook


def see_reductions(params: Params, see: See, comm_hook: CommHook | None) -> tuple[int, ...]:
    """Have `see` called with all that is reduced from now on. Never communicates.

    Args:
        comm_hook: DDP's own, in place of its all-reduce.

    Returns:
        The ranks over which gradients are reduced.

    Raises:
        ConfigError: a wrapper that shows nothing; wrappers over different ranks; none.
    """
    fsdp2 = imported_class("torch.distributed.fsdp", "FSDPModule")
    fsdp1 = imported_class("torch.distributed.fsdp", "FullyShardedDataParallel")
    found = [
        (strip_wrappers(name) or "the model", module)
        for model in modules_in(params)
        for name, module in model.named_modules()
    ]
    for name, module in found:
        if fsdp1 is not None and isinstance(module, fsdp1):
            raise ConfigError(
                f"RankNorms: {name} is wrapped by FSDP1, which shows no gradient before its "
                f"reduction in every strategy; use fully_shard (FSDP2) or DistributedDataParallel"
            )
    ddp = [(name, m) for name, m in found if isinstance(m, DistributedDataParallel)]
    sharded: list[tuple[str, Any]] = [
        (name, module)
        for name, module in found
        if fsdp2 is not None
        and isinstance(module, fsdp2)
        and reduce_scatters_of(module)
        # of several modules that are one unit some may have no parameters
        and any(map(is_dtensor, _own_parameters(module, fsdp2)))
    ]
    if not ddp and not sharded:
        raise ConfigError(
            "RankNorms: nothing here reduces gradients where they can be seen: pass a model that "
            "DistributedDataParallel or fully_shard was applied to. FSDP1, ZeRO, replicate and "
            "tensor, pipeline or expert parallelism alone show no rank's own gradient"
        )
    if comm_hook is not None and not ddp:
        raise ConfigError("RankNorms: comm_hook= is DDP's, and there is no such module")
    if comm_hook is not None:  # under RankNorms' own it would not be seen later
        check_comm_hook("RankNorms", comm_hook[1])
    over = [(name, _ranks_of(module.process_group)) for name, module in ddp]
    if fsdp2 is not None:
        over += [(name, _ranks_of_shards(name, module, fsdp2)) for name, module in sharded]
    for name, ranks in over:
        if ranks != over[0][1]:
            raise ConfigError(
                f"RankNorms: {over[0][0]} is reduced over ranks {over[0][1]}, {name} over {ranks}; "
                f"ranks that hold different parts cannot be compared"
            )
    for i, (name, module) in enumerate(ddp):
        _check_hooks(name, module)
        module.register_comm_hook(None, _ddp_hook(i, module, see, comm_hook))
    for i, (_, module) in enumerate(sharded):
        (now,) = reduce_scatters_of(module)
        if isinstance(now, _SeenReduceScatter) and now.see is see:
            continue  # several modules may be one unit
        module.set_custom_reduce_scatter(_SeenReduceScatter(i, module, len(over[0][1]), see))
    return over[0][1]


def _ranks_of(group: Any) -> tuple[int, ...]:
    return tuple(sorted(dist.get_process_group_ranks(group)))


def _own_parameters(module: nn.Module, kind: type) -> Iterator[Tensor]:
    """Those that this unit reduces: not those of units inside it."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not isinstance(child, kind):
            yield from _own_parameters(child, kind)


def _ranks_of_shards(name: str, module: Any, kind: type) -> tuple[int, ...]:
    """ConfigError where the unit's parameters are divided by more than FSDP2."""
    if not hasattr(module, "set_custom_reduce_scatter"):
        raise ConfigError(
            f"RankNorms: torch {torch.__version__} shows no gradient of fully_shard before its "
            f"reduction; later releases do"
        )
    if len(reduce_scatters_of(module)) > 1:
        raise ConfigError(f"RankNorms: {name} shards its parameters over several meshes")
    own = [p for p in _own_parameters(module, kind) if is_dtensor(p)]
    for param in own:
        split = [p for p in param.placements if not p.is_replicate()]
        if len(split) > 1 or param.device_mesh.ndim > 2:
            raise ConfigError(
                f"RankNorms: parameters of {name} are divided by tensor or expert parallelism "
                f"under fully_shard ({param.placements}); ranks that hold different parts cannot "
                f"be compared"
            )
    mesh = own[0].device_mesh
    if mesh.shape[-1] == 1:
        raise ConfigError(f"RankNorms: {name} is sharded over one rank, which reduces nothing")
    return tuple(sorted(mesh.mesh.flatten().tolist()))


def _check_hooks(name: str, module: DistributedDataParallel) -> None:
    delayed = delayed_names(module)
    if delayed:
        more = f" and {len(delayed) - 1} more" if len(delayed) > 1 else ""
        raise ConfigError(
            f"RankNorms: {name} reduces {strip_wrappers(delayed[0])}{more} past its communication "
            f"hook (delay_all_reduce_named_params), where no rank's own gradient is seen; build "
            f"DistributedDataParallel without delay_all_reduce_named_params, or leave rank_norms "
            f"out"
        )
    hooks = comm_hooks_of(module)
    if hooks:
        hook = getattr(hooks[0], "__qualname__", type(hooks[0]).__qualname__)
        raise ConfigError(
            f"RankNorms: {name} has the communication hook {hook} already, and DDP takes one; pass "
            f"it here before it is registered: RankNorms(model, comm_hook=(state, {hook}))"
        )


def _ddp_hook(number: int, module: Any, see: See, inner: CommHook | None) -> Any:
    """What it sees is not divided yet, and has all that was accumulated under `no_sync`."""
    # imports much that nothing else needs
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    state, reduce = inner or (module.process_group, allreduce_hook)

    def see_bucket(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        see((number, bucket.index()), bucket.buffer(), 1.0)
        return reduce(state, bucket)

    return see_bucket


class _SeenReduceScatter:
    """In place of a unit's reduce-scatter, which it calls."""

    def __init__(self, number: int, module: Any, num_ranks: int, see: See) -> None:
        self._number, self._module, self._num_ranks, self.see = number, module, num_ranks, see
        (self._inner,) = reduce_scatters_of(module)

    def allocate(
        self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        return self._inner.allocate(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        divided = predivided_by(self._module, input_tensor.dtype, self._num_ranks)
        self.see(("fsdp2", self._number), input_tensor, divided)
        return self._inner(
            output_tensor=output_tensor,
            input_tensor=input_tensor,
            group=group,
            op=op,
            async_op=async_op,
        )
