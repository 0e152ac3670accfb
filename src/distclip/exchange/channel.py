"""The one collective of a step, and the small gathers of set-up and failure paths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate
from typing import Final, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.errors import AgreementError, ConfigError, DistclipError, ExchangeError

Error = TypeVar("Error", bound=DistclipError)


class _LocalType:
    def __repr__(self) -> str:
        return "distclip.LOCAL"


LOCAL: Final = _LocalType()


class Channel:
    """A process group as distclip uses it: all-reduces of small vectors. One process without a
    group is a channel of one.

    Args:
        group: the process group, or None for this process alone.
        ranks: global ranks of the group, in order.
        rank: this process's position in `ranks`.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, ranks: Sequence[int] = (0,), rank: int = 0
    ) -> None:
        self.group, self.ranks, self.rank = group, tuple(ranks), rank
        self.size = len(self.ranks)
        self.global_rank = self.ranks[rank]
        self._comm_devices: dict[torch.device, torch.device] = {}

    @classmethod
    def from_group(cls, process_group: dist.ProcessGroup | _LocalType | None) -> Channel:
        """The channel of `process_group`: None is the default group, or this process alone where
        none is initialised.

        Raises:
            ConfigError: this rank is not in the group.
        """
        if isinstance(process_group, _LocalType):
            here = dist.get_rank() if dist.is_initialized() else 0
            return cls(None, (here,))
        if process_group is None:
            if not (dist.is_available() and dist.is_initialized()):
                return cls(None)
            process_group = dist.group.WORLD
        if not isinstance(process_group, (dist.ProcessGroup, int)):
            raise ConfigError(
                f"process_group is a {type(process_group).__name__}; pass a process group, None "
                "for the default one, or distclip.LOCAL for this process alone"
            )
        if not isinstance(process_group, dist.ProcessGroup):  # torch's mark of those outside
            here = dist.get_rank() if dist.is_initialized() else 0
            raise ConfigError(
                f"process_group is {process_group!r}, of which this rank ({here}) is no "
                f"member; "
                "build the clipper on the ranks of the group only, or pass distclip.LOCAL"
            )
        return cls(process_group, dist.get_process_group_ranks(process_group), process_group.rank())

    def is_same(self, other: Channel) -> bool:
        """Whether it is of the same group and ranks."""
        return self.group is other.group and self.ranks == other.ranks

    def comm_device(self, compute: torch.device) -> torch.device:
        """The device on which a message from `compute` is reduced: the same, if the group has a
        backend for it, else one that has."""
        if compute not in self._comm_devices:
            self._comm_devices[compute] = self._find_comm_device(compute)
        return self._comm_devices[compute]

    def _find_comm_device(self, compute: torch.device) -> torch.device:
        if self.group is None:
            return compute
        try:
            known = dist.get_backend_config(self.group)
        # a group that was never registered: threads as ranks
        except (ValueError, KeyError, RuntimeError, TypeError):
            return torch.device("cpu")
        backends = dict(pair.split(":") for pair in str(known).split(",") if ":" in pair)
        if not backends or compute.type in backends:
            return compute
        return (
            torch.device("cuda", torch.cuda.current_device())
            if "cuda" in backends
            else torch.device("cpu")
        )

    def all_reduce_(self, vector: Tensor, op: Literal["sum", "max"], what: str) -> Tensor:
        """All-reduce `vector` in place and return it. ExchangeError, which names `what`, if the
        collective fails or times out."""
        if self.group is None:
            return vector
        try:
            dist.all_reduce(
                vector, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=self.group
            )
        except RuntimeError as error:
            raise ExchangeError(
                f"distclip: {what} failed on rank {self.global_rank}: all_reduce({op.upper()}) of "
                f"{vector.numel()} "
                f"{str(vector.dtype).removeprefix('torch.')} over ranks "
                f"{format_ranks(self.ranks)}: "
                f"{error}. A rank was lost, is stuck, or "
                "did not make this call: look at the logs of the others"
            ) from error
        return vector

    def tell_once(self, error: Error, on: int | None = None) -> Error:
        """The same error, which all ranks of the channel raise together: one of them prints its
        whole text.

        Args:
            on: the global rank that does; the channel's first by default.
        """
        if self.size > 1:
            error.told_on(self.ranks[0] if on is None else on, self.global_rank)
        return error

    def gather_ints(self, words: Tensor, device: torch.device, what: str) -> Tensor:
        """[n] int64 of equal length on every rank → [ranks, n] on the CPU. One all-reduce."""
        table = torch.zeros(self.size, words.numel(), dtype=torch.int64, device="cpu")
        table[self.rank] = words
        return self.all_reduce_(table.to(self.comm_device(device)), "sum", what).cpu()

    def gather_texts(self, text: str, device: torch.device, what: str) -> list[str]:
        """Every rank's text. Two all-reduces; for set-up and failure paths."""
        data = text.encode(errors="backslashreplace")  # half of a surrogate pair has no code
        sizes = (
            self.gather_ints(torch.tensor([len(data)], device="cpu"), device, what)
            .flatten()
            .tolist()
        )
        start = sum(sizes[: self.rank])
        joined = torch.zeros(sum(sizes), dtype=torch.int32, device="cpu")
        joined[start : start + len(data)] = torch.tensor(
            list(data), dtype=torch.int32, device="cpu"
        )
        whole = bytes(
            self.all_reduce_(joined.to(self.comm_device(device)), "sum", what).cpu().tolist()
        )
        ends = accumulate(sizes)
        return [whole[end - size : end].decode() for size, end in zip(sizes, ends, strict=True)]

    def gather_lines(
        self, lines: Sequence[str], device: torch.device, what: str
    ) -> dict[str, list[int]]:
        """Each distinct line → the global ranks that sent it. Two all-reduces, as above.

        A line may itself hold line breaks.
        """
        said: dict[str, list[int]] = defaultdict(list)
        texts = self.gather_texts("\0".join(lines), device, what)
        for rank, text in zip(self.ranks, texts, strict=True):
            for line in text.split("\0") if text else ():
                said[line].append(rank)
        return said


def lines_by_rank(said: Mapping[str, Sequence[int]]) -> list[str]:
    """`rank 0-3,6: line`, for each line of `gather_lines`."""
    return [f"rank {format_ranks(ranks)}: {line}" for line, ranks in said.items()]


def first_rank(said: Mapping[str, Sequence[int]]) -> int:
    """The lowest rank that sent a line of `gather_lines`."""
    return min(min(ranks) for ranks in said.values())


def format_ranks(ranks: Sequence[int]) -> str:
    """0-3,6 for (0, 1, 2, 3, 6)."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


@lru_cache(maxsize=4096)  # set-up asks for names, groups and shapes again and again
def hash64(text: str) -> int:
    """8 bytes of a hash, as an int64."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def raise_on_all_ranks(
    channel: Channel, problems: Sequence[str], device: torch.device, what: str, remedy: str = ""
) -> None:
    """A collective: all ranks raise the same AgreementError if any rank has a problem; each line
    names its ranks.

    Args:
        remedy: the error's last line.
    """
    lines = "\n".join(problems).splitlines()
    said = channel.gather_lines(lines, device, what)
    if said:
        text = "\n".join([*lines_by_rank(said), *([remedy] if remedy else [])])
        raise channel.tell_once(AgreementError(text), first_rank(said))
