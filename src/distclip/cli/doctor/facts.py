"""What is installed and works on each rank, and where ranks differ. No collectives: the facts are
exchanged through the status store."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl
from torch.distributed.constants import default_pg_nccl_timeout, default_pg_timeout

import distclip
import distclip.kernels
import distclip.versions
from distclip.cli.doctor.records import CannotRun, CheckResult, RankInfo, name_ranks, ranks_by_value

PACKAGES = ("accelerate", "deepspeed", "lightning", "transformers")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# those whose fused step can take a coefficient
OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
ENVIRONMENT = ("OMP_NUM_THREADS", "NCCL_ALGO", "NCCL_PROTO", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")

# what must be equal on all ranks, and the remedy if it is not
MUST_MATCH = {
    "distclip": "install one version on every node",
    "torch": "install one version on every node",
    "python": "install one version on every node",
    **dict.fromkeys(PACKAGES, "install one version on every node"),
    "cuda": "install one build of torch on every node",
    "nccl": "install one build of torch on every node",
    "threads": "set OMP_NUM_THREADS to one value on every rank: a slow rank keeps all others "
    "waiting",
    **dict.fromkeys(ENVIRONMENT, "set it to one value on every rank, or unset it"),
    "kernel": "norms of different kernels differ in their last bits and speed: install distclip in "
    "the same way on every node",
    "dtypes": "ranks have different devices: train in a dtype that all have",
    "fused": "ranks have different devices: build optimizers alike on all",
}


def device_for(info: RankInfo, backend: str | None) -> tuple[str, torch.device]:
    """The backend and this rank's device: nccl on CUDA, gloo on the CPU, unless `backend` is given.

    Raises:
        CannotRun: `backend` is not available here.
    """
    cuda = torch.cuda.is_available() and torch.cuda.device_count() > 0
    backend_name = backend or ("nccl" if cuda and dist.is_nccl_available() else "gloo")
    if "nccl" not in backend_name:
        return backend_name, torch.device("cpu")
    if not cuda or not dist.is_nccl_available():
        raise CannotRun(
            f"rank {info.rank} on {info.host} has no CUDA device or no NCCL; "
            f"--backend gloo runs on the CPU"
        )
    device = torch.device("cuda", info.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return backend_name, device


def collect_facts(info: RankInfo, backend: str, device: torch.device) -> dict[str, Any]:
    """The facts of this rank."""
    on_cuda = device.type == "cuda"
    torchs_own = (
        default_pg_nccl_timeout
        if on_cuda and default_pg_nccl_timeout is not None
        else default_pg_timeout
    )
    return {
        "host": info.host,
        "device": f"{device} {torch.cuda.get_device_name(device)}" if on_cuda else "cpu",
        "device id": str(torch.cuda.get_device_properties(device).uuid) if on_cuda else "",
        "backend": backend,
        "distclip": distclip.__version__,
        "torch": torch.__version__,
        "note": distclip.versions.untested_release_note(torch.__version__) or "none",
        "python": platform.python_version(),
        **{name: _installed_version(name) for name in PACKAGES},
        "cuda": torch.version.cuda or "none",
        "nccl": ".".join(map(str, nccl.version())) if on_cuda else "none",
        "threads": torch.get_num_threads(),
        **{name: os.environ.get(name, "not set") for name in ENVIRONMENT},
        "kernel": distclip.kernels.active(),
        "dtypes": ", ".join(
            str(d).removeprefix("torch.") for d in DTYPES if _can_multiply(d, device)
        ),
        "fused": ", ".join(o.__name__ for o in OPTIMIZERS if _steps_fused(o, device)) or "none",
        "time-out": f"{info.timeout_s:g} s here (--timeout); torch's default is "
        f"{torchs_own.total_seconds():g} s",
    }


def judge_facts(all_facts: Sequence[dict[str, Any]]) -> CheckResult:
    """Whether the facts that must match do, and each rank has a GPU of its own."""
    problems: list[str] = []
    remedies: list[str] = []
    for name, remedy in MUST_MATCH.items():
        found = ranks_by_value([one[name] for one in all_facts])
        if len(found) > 1:
            problems.append(
                f"{name}: "
                + ", ".join(
                    f"{value} on {_format_location(ranks, all_facts)}"
                    for value, ranks in found.items()
                )
            )
            remedies.append(f"{name}: {remedy}")
    devices = ranks_by_value(
        [
            f"{one['host']} {one['device id']}" if one["device id"] else f"rank {r}"
            for r, one in enumerate(all_facts)
        ]
    )
    for ranks in devices.values():
        if len(ranks) > 1:
            problems.append(
                f"{name_ranks(ranks)} share one GPU ({all_facts[ranks[0]]['device']} on "
                f"{all_facts[ranks[0]]['host']})"
            )
            remedies.append("start as many processes on a node as it has GPUs")
    if problems:
        return CheckResult("alike", "fail", "; ".join(problems), "; ".join(dict.fromkeys(remedies)))
    return CheckResult(
        "alike", "pass", "versions, threads, kernel, dtypes and optimizers: the same on every rank"
    )


def cannot_start(all_facts: Sequence[dict[str, Any]]) -> str:
    """Why no process group can be started, or an empty text."""
    refusals = [one["cannot"] for one in all_facts if "cannot" in one]
    if refusals:
        return "; ".join(refusals)
    backends = ranks_by_value([one["backend"] for one in all_facts])
    if len(backends) > 1:
        which = ", ".join(
            f"{name} on {_format_location(ranks, all_facts)}" for name, ranks in backends.items()
        )
        return (
            f"ranks would use different backends: {which}. See why some have no CUDA device, or "
            "pass --backend gloo"
        )
    return ""


def format_nodes(all_facts: Sequence[dict[str, Any]]) -> str:
    """For instance "host: ranks 0-7, other: ranks 8-15"."""
    hosts = ranks_by_value([one["host"] for one in all_facts])
    return ", ".join(
        f"{host}: {name_ranks(ranks)}"
        for host, ranks in sorted(hosts.items(), key=lambda item: item[1])
    )


def _format_location(ranks: Sequence[int], all_facts: Sequence[dict[str, Any]]) -> str:
    hosts = {all_facts[rank]["host"] for rank in ranks}
    return name_ranks(ranks) + (
        f" ({hosts.pop()})"
        if len(hosts) == 1 and len({one["host"] for one in all_facts}) > 1
        else ""
    )


def _installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _can_multiply(dtype: torch.dtype, device: torch.device) -> bool:
    try:
        one = torch.ones(2, 2, dtype=dtype, device=device)
        return bool((one @ one == 2).all())
    except (RuntimeError, NotImplementedError):
        return False


def _steps_fused(optimizer: type[torch.optim.Optimizer], device: torch.device) -> bool:
    """Whether a fused step gives the same parameter as a plain one."""
    try:
        moved: list[torch.Tensor] = []
        for fused in (True, False):
            param = torch.nn.Parameter(torch.ones(4, device=device))
            param.grad = torch.full_like(param, 0.5)
            optimizer([param], lr=0.25, fused=fused).step()  # pyright: ignore[reportCallIssue]: the base class does not have it
            moved.append(param.detach())
        return torch.allclose(moved[0], moved[1]) and not torch.equal(
            moved[0], torch.ones_like(moved[0])
        )
    except (RuntimeError, NotImplementedError):
        return False
