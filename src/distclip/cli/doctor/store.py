"""A key-value store beside the process group, in which ranks publish their state, also while no
collective gets through."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist

from distclip.cli.doctor.records import CannotRun, RankInfo


def read_rank_info(timeout_s: float) -> RankInfo:
    """From RANK, WORLD_SIZE and LOCAL_RANK; without them this process is a world of one.

    Raises:
        CannotRun: some of the variables are missing or make no sense.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = [name for name in names if name in os.environ]
    if "RANK" not in given and "WORLD_SIZE" not in given:
        return RankInfo(
            rank=0, size=1, local_rank=0, host=socket.gethostname(), timeout_s=timeout_s
        )
    if len(given) < len(names):
        lacking = ", ".join(sorted(set(names) - set(given)))
        raise CannotRun(
            f"{', '.join(given)} are set, but not {lacking}; start with torchrun, or "
            f"set all four on every rank"
        )
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not 0 <= rank < size:
        raise CannotRun(
            f"RANK={rank} does not fit WORLD_SIZE={size}; ranks count from 0 to {size - 1}"
        )
    return RankInfo(
        rank=rank,
        size=size,
        local_rank=int(os.environ.get("LOCAL_RANK", rank)),
        host=socket.gethostname(),
        timeout_s=timeout_s,
    )


class StatusStore:
    """A store that all ranks reach: torchrun's own, or one that rank 0 opens at
    MASTER_ADDR:MASTER_PORT.

    Raises:
        CannotRun: it cannot be reached within the time-out.
    """

    def __init__(self, info: RankInfo) -> None:
        self.info = info
        if info.size == 1:
            self.address, self.hosted_here, store = "this process", True, dist.HashStore()
        else:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            self.address, self.hosted_here = f"{host}:{port}", not by_agent
            opens, wait = info.rank == 0 and not by_agent, timedelta(seconds=info.timeout_s)
            try:
                if not opens:
                    _await_port(host, port, info.timeout_s)
                # `collect` waits for each worker by name; the store itself could only count them
                store = dist.TCPStore(
                    host, port, None, opens, wait, wait_for_workers=False, multi_tenant=True
                )
            except (dist.DistError, RuntimeError, OSError) as error:
                who = "the launcher's agent on the first node" if by_agent else "rank 0"
                raise CannotRun(
                    f"rank {info.rank} on {info.host} did not reach the store at {self.address} "
                    f"within {info.timeout_s:g} s ({str(error).splitlines()[0]}). {who} opens it: "
                    "see whether it started, whether MASTER_ADDR and MASTER_PORT are the same on "
                    "every rank, and whether a firewall stands between"
                ) from error
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._prefix, self._plain_store = f"distclip-doctor-{attempt}", store
        self._store = dist.PrefixStore(self._prefix, store)

    def clone_connection(self) -> dist.Store:
        """A connection of its own to the same store, for another thread."""
        # in torch, but not in its stubs
        return dist.PrefixStore(self._prefix, cast(Any, self._plain_store).clone())

    def start_group(self, backend: str, timeout_s: float) -> None:
        """Start the default process group, with this store for its rendezvous."""
        store = dist.PrefixStore("group", self._store)
        wait = timedelta(seconds=timeout_s)
        dist.init_process_group(
            backend, store=store, rank=self.info.rank, world_size=self.info.size, timeout=wait
        )

    def publish(self, topic: str, value: Any) -> None:
        """Set this rank's value of a topic; it is stored as JSON."""
        self._store.set(f"{topic}/{self.info.rank}", json.dumps(value))

    def collect(self, topic: str, wait_s: float, ranks: Sequence[int] | None = None) -> list[Any]:
        """The values that `ranks` (all by default) published, by rank.

        Raises:
            TimeoutError: one is missing after `wait_s`, or the store is gone.
        """
        keys = [f"{topic}/{rank}" for rank in (range(self.info.size) if ranks is None else ranks)]
        try:
            self._store.wait(keys, timedelta(seconds=wait_s))
            return [json.loads(text) for text in self._store.multi_get(keys)]
        except (dist.DistError, RuntimeError) as error:
            raise TimeoutError(f"no word on {topic} within {wait_s:g} s") from error


def _await_port(host: str, port: int, wait_s: float) -> None:
    """Wait until something listens there. The store's own client may take several times its
    time-out.

    Raises:
        OSError: the last refusal, after `wait_s`.
    """
    end = time.monotonic() + wait_s
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, end - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
