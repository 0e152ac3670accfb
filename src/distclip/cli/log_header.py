"""The header of a log: what was run, by whom and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distclip.cli.log_lines import printable_name

_SCHEMA = 2  # the latest that is known here


@dataclass(frozen=True)
class PlanRow:
    """Parameters that are held alike over the same ranks."""

    parameters: int
    elements: int
    description: str
    ranks: tuple[int, ...]
    copies: int


@dataclass(frozen=True)
class RunHeader:
    """What a process wrote before its first step. Empty texts and None: not known."""

    schema: int
    date: str
    run: str
    policy: str
    groups: tuple[str, ...]
    world_size: int | None
    on_nonfinite: str
    layers: tuple[str, ...]
    plan: tuple[PlanRow, ...]
    versions: tuple[tuple[str, str], ...]  # package, version
    launcher: str
    device: str

    @property
    def is_newer(self) -> bool:
        return self.schema > _SCHEMA


def read_header(said: dict[str, Any]) -> RunHeader:
    """Fields of another kind than expected are taken as not known."""
    return RunHeader(
        schema=_whole(said.get("distclip_log")) or _SCHEMA,
        **{
            key: _text(said.get(key))
            for key in ("date", "run", "policy", "on_nonfinite", "launcher", "device")
        },
        groups=tuple(map(_text, _list(said.get("groups")))),
        world_size=_whole(said.get("world_size")),
        layers=tuple(map(_text, _list(said.get("layers")))),
        plan=tuple(_plan_row(row) for row in _list(said.get("plan")) if isinstance(row, dict)),
        versions=tuple(
            (_text(name), _text(version)) for name, version in _dict(said.get("versions")).items()
        ),
    )


def _plan_row(row: dict[str, Any]) -> PlanRow:
    return PlanRow(
        parameters=_whole(row.get("parameters")) or 0,
        elements=_whole(row.get("elements")) or 0,
        description=_text(row.get("description")),
        ranks=tuple(rank for rank in _list(row.get("ranks")) if isinstance(rank, int)),
        copies=_whole(row.get("copies")) or 1,
    )


def _text(value: Any) -> str:
    return "" if value is None else printable_name(str(value))


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
