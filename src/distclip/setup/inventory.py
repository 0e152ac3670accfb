"""Every rank's table of what it holds, gathered on all ranks by two small all-reduces.

A rank sends (1) its holdings: few, each a region and the sets of ranks that it is copied over, and
(2) its table: for each parameter an 8-byte key of the name and which holding it has. Ranks of the
same structure have equal tables, so a table travels once however many ranks share it: the traffic
grows with ranks + distinct tables x parameters, not with ranks x parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from distclip.errors import ConfigError
from distclip.exchange.channel import Channel, hash64
from distclip.records import ParamHolding, ParamPiece

_TEXT_WORDS, _MAX_RANK_SETS = 8, 6
_HOLDING_WORDS = _TEXT_WORDS + 2 + _MAX_RANK_SETS  # text, region, flags, rank sets
_DECLARED = 1 << _MAX_RANK_SETS  # a flag; the bits below it mark the module rank sets
# key of the name, holding, key of the shape, key of the group, key of the watched layer
_ROW_WORDS = 5


class RemoteHolding(NamedTuple):
    """A holding of another rank, as it came over the wire."""

    description: str
    region: int
    rank_sets: tuple[int, ...]
    module_rank_sets: tuple[int, ...]
    declared: bool


@dataclass(frozen=True, slots=True)
class HoldingTables:
    """The holdings of all ranks, equal on every rank."""

    holdings: list[list[RemoteHolding]]  # [ranks]
    ranks_of: list[list[int]]  # [tables]: positions of the ranks that have it
    rows: list[Tensor]  # [tables] of [parameters, 5] int64
    mine: int  # this rank's table
    counts: list[int]  # [patterns]: matches over all ranks


def exchange_tables(
    channel: Channel,
    pieces: Sequence[ParamPiece],
    group_of: Sequence[str],
    layer_of: Sequence[str],
    counts: Sequence[int],
    device: torch.device,
    beside: Sequence[ParamHolding] = (),
) -> HoldingTables:
    """Two all-reduces: sizes and digests, then holdings and each distinct table once.

    Args:
        group_of, layer_of: [pieces] names.
        beside: holdings of parameters without a piece; their meshes join ranks too.
    """
    holdings = list(dict.fromkeys([*(piece.holding for piece in pieces), *beside]))
    ordinal = {holding: i for i, holding in enumerate(holdings)}
    rows = [
        (
            hash64(piece.key_name),
            ordinal[piece.holding],
            hash64(f"{piece.shape}"),
            hash64(group),
            hash64(layer),
        )
        for piece, group, layer in zip(pieces, group_of, layer_of, strict=True)
    ]
    table = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, _ROW_WORDS)
    digest = hash64(str(rows))
    heads = channel.gather_ints(
        torch.tensor([digest, len(rows), len(holdings)], device="cpu"),
        device,
        "the set-up's table of sizes",
    ).tolist()

    # digest → first rank that has it
    first = {d: rank for rank, (d, _, _) in reversed(list(enumerate(heads)))}
    senders = sorted(set(first.values()))
    words = [h * _HOLDING_WORDS for _, _, h in heads] + [
        heads[rank][1] * _ROW_WORDS for rank in senders
    ]
    starts = [0, *accumulate(words)]
    buffer = torch.zeros(starts[-1] + len(counts), dtype=torch.int64, device="cpu")
    _put_words(
        buffer,
        starts[channel.rank],
        torch.tensor([_encode_holding(h) for h in holdings], dtype=torch.int64, device="cpu"),
    )
    if channel.rank in senders:
        _put_words(buffer, starts[channel.size + senders.index(channel.rank)], table)
    _put_words(buffer, starts[-1], torch.tensor(counts, dtype=torch.int64, device="cpu"))
    buffer = channel.all_reduce_(
        buffer.to(channel.comm_device(device)), "sum", "the set-up's exchange of tables"
    ).cpu()

    ranks_of: dict[int, list[int]] = {sender: [] for sender in senders}
    for rank, head in enumerate(heads):
        ranks_of[first[head[0]]].append(rank)
    blocks = [buffer[a:b] for a, b in pairwise(starts)]
    return HoldingTables(
        holdings=[
            [_decode_holding(words) for words in block.reshape(-1, _HOLDING_WORDS).tolist()]
            for block in blocks[: channel.size]
        ],
        ranks_of=list(ranks_of.values()),
        rows=[block.reshape(-1, _ROW_WORDS) for block in blocks[channel.size :]],
        mine=senders.index(first[digest]),
        counts=buffer[starts[-1] :].tolist(),
    )


def _put_words(buffer: Tensor, start: int, words: Tensor) -> None:
    buffer[start : start + words.numel()] = words.flatten()


def _encode_holding(holding: ParamHolding) -> list[int]:
    text = holding.description.encode()[: 8 * _TEXT_WORDS].ljust(8 * _TEXT_WORDS)
    rank_sets = [hash64(rank_set) for rank_set in holding.rank_sets]
    if len(rank_sets) > _MAX_RANK_SETS:
        raise ConfigError(
            f"a parameter is copied over {len(rank_sets)} nested sets of ranks "
            f"({holding.rank_sets}); at "
            f"most {_MAX_RANK_SETS} are supported"
        )
    letters = [
        int.from_bytes(text[i : i + 8], "little", signed=True) for i in range(0, len(text), 8)
    ]
    flags = sum(
        1 << i
        for i, rank_set in enumerate(holding.rank_sets)
        if rank_set in holding.module_rank_sets
    )
    flags |= _DECLARED if holding.declared else 0
    return [
        *letters,
        hash64(holding.region),
        flags,
        *rank_sets,
        *[0] * (_MAX_RANK_SETS - len(rank_sets)),
    ]


def _decode_holding(words: list[int]) -> RemoteHolding:
    text = b"".join(word.to_bytes(8, "little", signed=True) for word in words[:_TEXT_WORDS])
    region, flags, *rank_sets = words[_TEXT_WORDS:]
    return RemoteHolding(
        description=text.decode(errors="replace").rstrip(),
        region=region,
        rank_sets=tuple(rank_set for rank_set in rank_sets if rank_set),
        module_rank_sets=tuple(
            rank_set for i, rank_set in enumerate(rank_sets) if flags & (1 << i)
        ),
        declared=bool(flags & _DECLARED),
    )


# What to do where the same name means something else on other ranks.
DECLARE = (
    "If these are different parameters under one name (pipeline stages, experts), declare "
    "replicated_over={pattern: process group | distclip.PRIVATE}"
)
