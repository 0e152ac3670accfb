"""Each rank's own gradient norm, before the ranks' gradients become one."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from distclip.errors import ConfigError
from distclip.kernels.tensor_list import TensorList
from distclip.p_norm import PNorm, p_norm
from distclip.setup.parameters import Params
from distclip.setup.reductions import CommHook, see_reductions

MOST_RANKS = 1024


class RankNorms:
    """For `GradClipper(model, rank_norms=RankNorms(model))`: the report's `rank_norms` has for each
    rank the norm of the gradient of its own loss, before the reduction.

    Reductions hide which rank a gradient came from. A rank on a broken device, or with a poisonous
    shard of the data, shows here, and nowhere else: `report.outlier_rank`.

    The number of a rank is the p-norm (the clipper's p) of what its backward pass left in all
    parameters that the wrappers reduce: of the mean over its own batch where its loss is that;
    not divided by the number of ranks; unscaled, and times `grad_scale`. What was accumulated
    without synchronisation (`no_sync()`, `set_requires_gradient_sync(False)`) is in it, as one
    gradient. A second reduction before the clip is an error: the norm of a sum is not known from
    its parts. After a call, `measure()` too, it is of what was reduced since; `measure()` leaves it
    to the step. A step before which nothing was reduced anew has no norms of ranks.

    Reads the gradients once more, right before each reduction. One word of the step's message for
    each rank carries them; no other message, no host read.

    It works under DistributedDataParallel, whose all-reduce becomes torch's `allreduce_hook`, and
    under `fully_shard` (FSDP2, HSDP too), from the release of torch on that has
    `set_custom_reduce_scatter`. Built after wrapping, before the first backward pass; only once for
    a model. Not under FSDP1, ZeRO and `replicate`, which show no gradient before it is reduced,
    and not where ranks hold different parameters or parts (tensor, pipeline, expert parallelism):
    their norms cannot be compared.

    Args:
        params: the model, or a list of modules.
        comm_hook: (state, hook), a communication hook of your own for DDP: it takes one, so this
            one must not be registered there too.

    Raises:
        ConfigError: it cannot work here.
    """

    def __init__(self, params: Params, comm_hook: CommHook | None = None) -> None:
        hook: object = comm_hook
        if hook is not None and not (isinstance(hook, tuple) and len(hook) == 2):
            raise ConfigError(
                f"RankNorms: comm_hook={comm_hook!r}; pass a pair (state, hook), as to "
                f"DistributedDataParallel.register_comm_hook(state, hook)"
            )
        self._norms: tuple[PNorm, ...] = ()  # of the clippers that ask
        self._sums: dict[Hashable, dict[PNorm, Tensor]] = {}  # by reduction
        self._is_old = False  # a call has taken them; the next reduction begins anew
        self.round = 0  # of reductions, from 1: what was reduced between two calls
        self.last_stepped = 0  # the round of the last step, of whichever clipper
        self._twice = False
        self.ranks = see_reductions(params, self._see, comm_hook)
        if len(self.ranks) > MOST_RANKS:
            raise ConfigError(
                f"RankNorms: {len(self.ranks)} ranks; the message has a word for each of up to "
                f"{MOST_RANKS}"
            )

    def use_norm(self, norm: PNorm) -> None:
        """A clipper's: of several, each may have another."""
        if norm not in self._norms:
            self._norms = (*self._norms, norm)
            if any(norm not in sums for sums in self._sums.values()):
                self.forget()

    def forget(self) -> None:
        """What was reduced since the last call: after a backward pass whose gradients were thrown
        away."""
        self._sums, self._is_old, self._twice = {}, False, False

    @torch.no_grad()
    def _see(self, reduction: Hashable, grad: Tensor, divided: float) -> None:
        if self._is_old:
            self.forget()
        self.round += not self._sums
        self._twice = self._twice or reduction in self._sums
        grads = TensorList.of([grad.detach()])
        own = {norm: grads.power_sums(norm.p) for norm in self._norms or (p_norm(2.0),)}
        if divided != 1:
            own = {norm: sums * norm.power_of(divided) for norm, sums in own.items()}
        self._sums[reduction] = own

    def has_since(self, stepped: int) -> bool:
        """Whether something was reduced after the round of a clipper's last step."""
        return bool(self._sums) and self.round > stepped

    def take(self, norm: PNorm, device: torch.device, factor: Any) -> Tensor:
        """[] float64 on `device`: this rank's norm of what was reduced, times a factor. It stays
        for further calls and clippers; the next reduction begins anew."""
        self._is_old = True
        sums = torch.cat([each[norm].to(device) for each in self._sums.values()])
        return norm.finish(norm.combine(sums)) * factor

    def errors(self, any_grads: bool, has_some: bool) -> list[str]:
        """What is wrong with what was seen since the last call.

        Args:
            has_some: this call takes norms of it.
        """
        if has_some and self._twice:
            return [
                "rank_norms: gradients were reduced more than once since the last call, and the "
                "norm of their sum is not known: reduce at the last micro-step alone (no_sync(), "
                "set_requires_gradient_sync(False)); after a backward pass whose gradients were "
                "thrown away call rank_norms.forget()"
            ]
        if any_grads and not self.round:
            return [
                "rank_norms: there are gradients, and RankNorms saw no reduction: it was built of "
                "another model, or after the backward pass"
            ]
        return []
