"""distclip inside the frameworks that own the training loop: `accelerate`, `deepspeed`,
`lightning`, `megatron`, `torchtitan`, `transformers`.

Each module needs its framework, and is imported on first access:
`distclip.integrations.accelerate.prepare(...)` works after `import distclip` alone.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import NoReturn

_FRAMEWORKS = ("accelerate", "deepspeed", "lightning", "megatron", "torchtitan", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in _FRAMEWORKS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_FRAMEWORKS)}"
    )


def __dir__() -> list[str]:
    return sorted({*_FRAMEWORKS, *(name for name in globals() if name.startswith("__"))})


def raise_missing_extra(
    error: ModuleNotFoundError, framework: str, needs: str | None = None
) -> NoReturn:
    """Raise a ModuleNotFoundError that names the extra to install: importing `needs` (by default
    the framework) failed with `error`."""
    needed = needs or framework
    if (error.name or "").partition(".")[0] != needed:
        raise error
    extras = framework if needed == framework else f"{framework},{needed}"
    raise ModuleNotFoundError(
        f"distclip.integrations.{framework} needs {needed}, which is not installed here: pip "
        f'install "distclip[{extras}]"',
        name=error.name,
    ) from error
