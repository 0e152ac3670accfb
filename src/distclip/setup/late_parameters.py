"""Parameters that join the modules after set-up. If no module registered anything since the last
step, none is walked."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from distclip.setup.parameters import ModuleEntry, module_entries


class _RegistrationCounter:
    """Counts what is registered with any module of this process, while it has watchers."""

    def __init__(self) -> None:
        self.count = 0
        self._watchers = 0
        self._handles: list[Any] = []

    def __call__(self, module: nn.Module, name: str, value: Any) -> None:
        self.count += 1

    def add_watcher(self, watcher: object) -> None:
        """Count for as long as `watcher` lives."""
        if not self._watchers:
            self._handles = [
                torch_modules.register_module_parameter_registration_hook(self),
                torch_modules.register_module_module_registration_hook(self),
            ]
        self._watchers += 1
        weakref.finalize(watcher, self._remove_watcher).atexit = False

    def _remove_watcher(self) -> None:
        self._watchers -= 1
        while not self._watchers and self._handles:
            self._handles.pop().remove()


REGISTRATIONS = _RegistrationCounter()


class LateParameters:
    """Compares the modules with what they held at set-up. Never communicates.

    A late parameter is trainable, is registered under a name that was free, and has a gradient: a
    frozen or unused one is reported once it has one. A parameter that replaces a known one is not
    late: sharding frameworks swap those in and out, and `ModuleEntry.is_replaced` checks them.

    Args:
        modules: that were passed; none where pairs or parameters were.
        slots: what they held at set-up.
        grad_of: where a parameter's gradient is.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        entries: Sequence[ModuleEntry],
        grad_of: Callable[[Tensor], Tensor | None],
    ) -> None:
        self._modules, self._grad_of = modules, grad_of
        # keeps the tables and parameters below alive, so that their ids are not reused
        self._module_entries = entries
        self._places = {(id(entry.table), entry.key) for entry in entries}
        self._params = {id(entry.value) for entry in entries if isinstance(entry.value, Tensor)}
        self._waiting: list[ModuleEntry] = []
        self._remember_modules()
        if modules:
            REGISTRATIONS.add_watcher(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy's modules have identities of their own, and are compared with what these held."""
        return _copied, (self._modules, self._module_entries, self._grad_of)

    def late_errors(self, of_params: bool = False) -> list[str]:
        """A text if parameters joined. `of_params`: parameters are measured, and need no gradient
        to count."""
        if not self._modules:
            return []
        # insert() of torch's lists of modules registers nothing; a step after which nothing was
        # registered looks at nothing else
        if REGISTRATIONS.count != self._seen or (
            self._lists and sum(map(len, self._lists)) != self._listed
        ):
            self._compare_modules()
        if not self._waiting:
            return []
        if self._late_paths(of_params):
            self._compare_modules()  # it may have been removed again
        new = self._late_paths(of_params)
        return (
            [
                f"{new[0]} joined the model after the clipper was built ({len(new)} in all); call "
                f"clipper.rebuild() on all ranks"
            ]
            if new
            else []
        )

    def look_again(self) -> None:
        """Compare everything at the next call."""
        self._seen, self._held = -1, []

    def _late_paths(self, of_params: bool) -> list[str]:
        return [
            entry.path
            for entry in self._waiting
            if self._is_late(entry.table.get(entry.key), of_params)
        ]

    def _compare_modules(self) -> None:
        now = self._held_values()
        if len(now) == len(self._held) and all(map(is_, now, self._held)):  # registered elsewhere
            self._seen, self._listed = REGISTRATIONS.count, sum(map(len, self._lists))
            return
        self._remember_modules()
        self._waiting = [
            entry
            for entry in module_entries(self._modules)
            if isinstance(entry.value, Tensor)
            and (id(entry.table), entry.key) not in self._places
            and id(entry.value) not in self._params
        ]

    def _remember_modules(self) -> None:
        """Record what the modules hold now: the next comparison is with this."""
        every = {id(m): m for module in self._modules for m in module.modules()}
        every |= {
            id(entry.value): entry.value
            for entry in self._module_entries
            if isinstance(entry.value, nn.Module)
        }
        self._tables: list[dict[str, Any]] = [
            table for m in every.values() for table in (m._parameters, m._modules)
        ]
        self._held = self._held_values()
        self._lists = [
            m._modules for m in every.values() if isinstance(m, (nn.ModuleList, nn.Sequential))
        ]
        self._listed, self._seen = sum(map(len, self._lists)), REGISTRATIONS.count

    def _held_values(self) -> list[Any]:
        return [value for table in self._tables for value in table.values()]

    def _is_late(self, param: Any, of_params: bool) -> bool:
        if not isinstance(param, Tensor) or not param.requires_grad:
            return False
        try:
            return of_params or self._grad_of(param) is not None
        except Exception:  # it does not know this parameter
            return True


def _copied(
    modules: Sequence[nn.Module],
    entries: Sequence[ModuleEntry],
    grad_of: Callable[[Tensor], Tensor | None],
) -> LateParameters:
    copy = LateParameters(modules, entries, grad_of)
    copy.look_again()
    return copy
