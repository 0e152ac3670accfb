"""Gradients that are DTensors with other placements than their parameters: the weight of a rank's
part, and reduction of partial sums on request.

torch's optimizers take such gradients: they redistribute them to the parameter's placements. Tensor
parallelism alone leaves a Replicate gradient on a row-sharded embedding, and Partial ones on norm
weights of sequence parallelism.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from distclip.errors import ConfigError, GradientError
from distclip.exchange.channel import Channel, format_ranks, hash64
from distclip.records import ParamPiece
from distclip.torch_internals.dtensor import is_dtensor


def kind_error(grad: Tensor, param: Tensor, piece: ParamPiece) -> str | None:
    """What is wrong with a gradient that is a DTensor where the plan's parameter is not, the other
    way round, or on another mesh."""
    if is_dtensor(grad):
        if piece.placements is None or not is_dtensor(param):
            seen = f"is a DTensor with placements {grad.placements}, its parameter is not"
        elif grad.device_mesh != param.device_mesh:
            seen = f"is on the mesh {grad.device_mesh}, its parameter on {param.device_mesh}"
        else:
            return None
    elif piece.placements is not None:
        seen = f"is a plain tensor, its parameter a DTensor, {piece.placements}"
    else:
        return None
    return f"the gradient of {piece.name} {seen}; call clipper.rebuild()"


def placed_otherwise(grad: Tensor, piece: ParamPiece) -> bool:
    return is_dtensor(grad) and piece.placements is not None and grad.placements != piece.placements


def portion_of(grad: Tensor, piece: ParamPiece) -> float | str:
    """How much counts of this rank's part of a gradient that is placed otherwise than its
    parameter, for each copy of that; a text where no part of it does.

    A gradient that is replicated over n ranks where the parameter is sharded over them is whole on
    each: 1/n. Where both are sharded, over whichever dimensions, the parts add up: 1.
    """
    assert is_dtensor(grad) and piece.placements is not None
    seen = (
        f"the gradient of {piece.name} has placements {grad.placements}, its parameter "
        f"{piece.placements}"
    )
    if is_partial(grad):
        return (
            f"{seen}: Partial sums that are not reduced yet (sequence parallelism leaves them "
            f"on norm weights)"
        )
    portion = 1.0
    for of_grad, of_param, size in zip(
        grad.placements, piece.placements, grad.device_mesh.shape, strict=True
    ):
        if of_param.is_replicate() and not of_grad.is_replicate():
            return f"{seen}: no rank has all that its copy of the parameter is stepped with"
        if of_grad.is_replicate() and not of_param.is_replicate():
            portion /= size
    return portion


def is_partial(grad: Tensor | None) -> bool:
    return is_dtensor(grad) and any(placement.is_partial() for placement in grad.placements)


def redistribute_advice(grads: Sequence[Tensor], elsewhere: bool) -> str:
    """What to do about these gradients, which are not placed as they must be. `elsewhere`: not in
    `.grad`, but where `grad_of` says."""
    many = f" ({len(grads)} gradients in all)" if len(grads) > 1 else ""
    if elsewhere:
        return (
            f"{many}. Have grad_of return gradients that are redistributed to their "
            f"parameters' "
            f"placements"
        )
    loop = (
        f"{many}. Before clipping, on all ranks: `for p in model.parameters(): p.grad = "
        "p.grad.redistribute(placements=p.placements) if isinstance(p.grad, DTensor) else p.grad`"
    )
    return (
        f'{loop}; GradClipper(..., partial_grads="reduce") does it for Partial ones at each step'
        if any(map(is_partial, grads))
        else loop
    )


class PartialReducer:
    """Reduces Partial gradients before each call, for `partial_grads="reduce"`. Building one is a
    collective.

    A step then sends, besides its one message: a small one by which the ranks of each mesh agree on
    which gradients are Partial, so that no rank waits for a reduction that another does not make,
    and the reductions themselves.

    Args:
        params: [pieces].
        device: the compute device.
    """

    def __init__(
        self,
        channel: Channel,
        params: Sequence[Tensor],
        pieces: Sequence[ParamPiece],
        device: torch.device,
    ) -> None:
        self._channel, self._device = channel, device
        by_mesh: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
        for param, piece in zip(params, pieces, strict=True):
            if is_dtensor(param):
                by_mesh[hash64(f"{param.device_mesh.mesh.tolist()}")].append(
                    (piece.key_name, param)
                )
        # in one order on all ranks: a rank that reduces another gradient first would hang, or mix
        # up the sums
        self._by_mesh = {
            mesh: sorted(by_mesh[mesh], key=lambda member: member[0]) for mesh in sorted(by_mesh)
        }
        meshes = channel.gather_ints(
            torch.tensor([len(by_mesh)], device="cpu"), device, "the set-up's count of meshes"
        )
        self._rows = int(meshes.max())

    def reduce_partial_(self, step: int, call: str, reduces: bool) -> None:
        """A collective, at every call of the clipper. Sets `.grad` of the parameters concerned.

        Args:
            call: a description of the call. Where ranks make different calls nothing is reduced:
                the step's own message finds that.
            reduces: False where gradients play no part.

        Raises:
            GradientError: on all ranks, where ranks of one mesh have different Partial gradients;
                ConfigError: in a CUDA graph's capture.
        """
        if not self._rows:
            return
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ConfigError(
                'partial_grads="reduce" agrees on the host which gradients are Partial, which a '
                "CUDA graph cannot capture; redistribute "
                "them inside the graph, before the step"
            )
        if not self._agree_on_partial(step, call) or not reduces:
            return
        for _, param in (member for members in self._by_mesh.values() for member in members):
            grad = param.grad
            if is_dtensor(grad) and is_partial(grad):
                assert is_dtensor(param)
                param.grad = grad.redistribute(placements=param.placements)

    def _agree_on_partial(self, step: int, call: str) -> bool:
        """Whether all ranks make the same call; which of their gradients are Partial must then
        agree mesh by mesh."""
        rows = torch.zeros(1 + 2 * self._rows, dtype=torch.int64, device="cpu")
        rows[0] = hash64(f"{step} {call}")
        for i, (mesh, members) in enumerate(self._by_mesh.items()):
            placed = [
                f"{name} {p.grad.placements}"
                for name, p in members
                if is_dtensor(p.grad) and is_partial(p.grad)
            ]
            rows[1 + 2 * i : 3 + 2 * i] = torch.tensor(
                [mesh, hash64("\n".join(placed))], device="cpu"
            )
        table = self._channel.gather_ints(
            rows, self._device, f"the agreement on Partial gradients at step {step}"
        )
        if (table[:, 0] != table[0, 0]).any():
            return False
        found: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for rank, (_, *words) in zip(self._channel.ranks, table.tolist(), strict=True):
            for mesh, digest in zip(words[::2], words[1::2], strict=True):
                if mesh:
                    found[mesh][digest].append(rank)
        apart = [sorted(sides.values()) for sides in found.values() if len(sides) > 1]
        if apart:
            sides = " and ".join(f"rank {format_ranks(ranks)}" for ranks in apart[0])
            text = (
                f"step {step}: {sides} share a mesh and have different Partial gradients, which "
                "cannot be reduced together; the loss must reach the same parameters on all of them"
            )
            raise self._channel.tell_once(GradientError(text))
        return True
