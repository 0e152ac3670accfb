"""Runs a function on several gloo ranks, and counts collectives. For distclip's own tests and its
users'."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from distclip import versions

__all__ = [
    "CollectiveCounter",
    "ThreadGroup",
    "World",
    "count_collectives",
    "fresh_process",
    "fully_shard",
    "run_threads",
]

# until all ranks of a pool have met: on a busy machine the imports alone take long
STARTING_S = 300.0


class World:
    """A pool of gloo ranks on this machine that stays up between calls.

    Ranks do not descend from this process, which may have run a backward pass: torch's engine
    cannot be forked after that. They are forked from one that has imported torch and computed
    nothing, and take over this process's environment, folder and filters of warnings as they are
    when the ranks start. As with every process that `multiprocessing` does not fork from its
    caller, a script needs `if __name__ == "__main__":` around what it does.

    Args:
        size: number of ranks; each uses one thread.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks: list[tuple[Any, Any, Path]] = []
        # of the ranks' store and stacks
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
        """`fn(*args)` on every rank, a function of a module that can be imported; the answers by
        rank.

        Raises:
            AssertionError: ranks raised (their tracebacks, grouped), died, or hang after `timeout`
                seconds (their stacks), which begin when all ranks are up. The pool is then closed,
                and restarts at the next call.
        """
        if not self._ranks:
            self._start_ranks()
            self._collect_answers(STARTING_S)
        for _, pipe, _ in self._ranks:
            pipe.send((fn, args))
        return self._collect_answers(timeout)

    def _collect_answers(self, timeout: float) -> list[Any]:
        answers: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + timeout
        while len(answers) < self.size and time.monotonic() < end:
            for rank, (process, pipe, _) in enumerate(self._ranks):
                if rank in answers:
                    continue
                try:
                    if pipe.poll(0.002):
                        answers[rank] = pipe.recv()
                    elif not process.is_alive():
                        raise EOFError
                except (EOFError, OSError):  # the other end is closed
                    process.join(30)
                    answers[rank] = (False, f"the process died, exit code {process.exitcode}")
                if rank in answers and not answers[rank][0]:
                    end = min(end, time.monotonic() + 5)  # the others may be waiting for this one
        wrong: dict[str, list[int]] = {}
        for rank in range(self.size):
            ok, said = answers.get(rank) or (False, f"hangs:\n{self._stack_of(rank)}")
            if not ok:
                wrong.setdefault(said, []).append(rank)
        if wrong:
            self.close()
            raise AssertionError(
                "\n".join(f"ranks {ranks}: {text}" for text, ranks in wrong.items())
            )
        return [answers[rank][1] for rank in range(self.size)]

    def close(self) -> None:
        """End the ranks; the next `run` starts new ones."""
        for process, pipe, _ in self._ranks:
            pipe.close()
            process.kill()
            process.join()
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> World:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start_ranks(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="distclip-world-")
        folder = Path(self._folder.name)
        for rank in range(self.size):
            ours, theirs = multiprocessing.Pipe()
            log = folder / f"stack{rank}"
            process = fresh_process(_serve_calls, rank, self.size, folder / "store", theirs, log)
            process.start()
            theirs.close()
            self._ranks.append((process, ours, log))

    def _stack_of(self, rank: int) -> str:
        """The latest call first, down to this file's own."""
        process, _, log = self._ranks[rank]
        os.kill(process.pid, signal.SIGUSR1)
        end = time.monotonic() + 10  # a process that is stopped would never answer
        while (
            " in _serve_calls" not in (said := log.read_text() if log.exists() else "")
            and time.monotonic() < end
        ):
            time.sleep(0.05)
        return said.partition(" in _serve_calls")[0].rpartition("\n")[0]


def fresh_process(target: Callable[..., object], *args: Any) -> Any:
    """A process, not yet started, that is to call `target(*args)`. It descends from one that
    imported torch and computed nothing, and has this process's environment and filters of warnings,
    as a forked one would."""
    server = multiprocessing.get_context("forkserver")
    # the latter by the first optimizer or DTensor, and not quickly
    server.set_forkserver_preload([__name__, "torch._dynamo"])
    return server.Process(
        target=_as_here, args=(dict(os.environ), list(warnings.filters), target, args), daemon=True
    )


def _as_here(
    environment: dict[str, str],
    filters: list[Any],
    target: Callable[..., object],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    warnings.resetwarnings()
    for action, message, category, module, line in reversed(filters):
        patterns = [
            text if text is None or isinstance(text, str) else text.pattern
            for text in (message, module)
        ]
        warnings.filterwarnings(action, patterns[0] or "", category, patterns[1] or "", line)
    # what was imported stays: no garbage collection goes through it, and no search for objects
    gc.freeze()
    target(*args)


def _serve_calls(rank: int, size: int, store: Path, pipe: Any, log: Path) -> None:
    with log.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)
        torch.set_num_threads(1)
        file_store = dist.FileStore(str(store), size)
        dist.init_process_group(
            "gloo", rank=rank, world_size=size, store=file_store, timeout=timedelta(seconds=300)
        )
        answer: tuple[bool, Any] = (True, None)
        while True:
            pipe.send(answer)
            try:
                asked = pipe.recv_bytes()
            except EOFError:  # the process that asked is gone
                return
            try:
                fn, args = pickle.loads(asked)
                answer = (True, fn(*args))
            except BaseException:
                answer = (False, traceback.format_exc())


def fully_shard(module: nn.Module, **options: Any) -> Any:
    """torch's `fully_shard`, with gradients that are means in torch 2.8 too, where gloo's
    reduce-scatter sums although FSDP2 asks it for the mean."""
    sharded: Any = torch_fully_shard(module, **options)
    if versions.is_before(2, 9):
        sharded.set_force_sum_reduction_for_comms(True)  # FSDP2 divides by itself
    return sharded


class ThreadGroup(dist.ProcessGroup):
    """A process group whose ranks are threads: all-reduces are real, ordered by rank, and end in an
    error after a time-out."""

    def __init__(self, rank: int, size: int, meeting: _ThreadMeeting) -> None:
        super().__init__(rank, size)  # pyright: ignore[reportCallIssue]: torch's stub knows another constructor
        self._meeting = meeting
        self.calls = 0

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.calls += 1
        op = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        self._meeting.all_reduce_(self.rank(), tensors[0], op)
        return _DoneWork()


class _DoneWork:
    def wait(self, timeout: Any = None) -> bool:
        return True


class _ThreadMeeting:
    def __init__(self, size: int, timeout_s: float) -> None:
        self.size, self.timeout_s = size, timeout_s
        self.barrier = threading.Barrier(size)
        self.tensors: list[Tensor | None] = [None] * size
        self.result: Tensor | None = None
        self.held = 0

    def all_reduce_(self, rank: int, tensor: Tensor, op: Any) -> None:
        self.tensors[rank] = tensor
        self._wait_for_all()
        if rank == 0:
            stacked = torch.stack([t for t in self.tensors if t is not None])
            self.result = (
                stacked.sum(0, dtype=tensor.dtype) if op == dist.ReduceOp.SUM else stacked.amax(0)
            )
        self._wait_for_all()
        assert self.result is not None
        tensor.copy_(self.result)
        self._wait_for_all()
        self.held += rank == 0

    def timeout_error(self) -> RuntimeError:
        return RuntimeError(f"not all of {self.size} threads came within {self.timeout_s:g} s")

    def _wait_for_all(self) -> None:
        try:
            self.barrier.wait(self.timeout_s)
        except threading.BrokenBarrierError:
            raise self.timeout_error() from None


def run_threads(
    size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 300.0
) -> list[Any]:
    """`fn(group, *args)` on `size` threads as ranks; the answers by rank. A rank that raises ends
    the others' waiting.

    Raises:
        RuntimeError: some rank waits for others, or makes no further collective and does not end,
            for `timeout_s`.
    """
    meeting = _ThreadMeeting(size, timeout_s)
    answers: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run_rank(rank: int) -> None:
        try:
            answers[rank] = fn(ThreadGroup(rank, size, meeting), *args)
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run_rank, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        held = -1
        while thread.is_alive() and held != meeting.held:
            held = meeting.held
            thread.join(timeout_s)
    if not errors and any(thread.is_alive() for thread in threads):
        meeting.barrier.abort()  # threads that wait there for the others end too
        errors.append(meeting.timeout_error())
    if errors:
        raise errors[0]
    return answers


class CollectiveCounter(TorchDispatchMode):
    """Names of the collectives issued inside the block: native, functional, and those that DTensor
    makes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func.namespace in ("c10d", "_c10d_functional", "c10d_functional")
            and "wait" not in str(func)
            and "_wrap" not in str(func)
        ):
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@contextmanager
def count_collectives() -> Generator[CollectiveCounter]:
    """`with count_collectives() as seen: ...; assert seen.names == ["allreduce_"]`"""
    with CollectiveCounter() as seen:
        yield seen
