"""Two replica groups of two ranks under torchft: the second is killed within a step and comes back.
`torchft_loop.py` starts all of them, and prints what each rank saw."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distclip

GROUPS, RANKS, KILLED_AT, JOINT, LIMIT_S = 2, 2, 3, 3, 240


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def batch(step, replica, rank):
    """What a rank sees at a step: of its own, so that norms tell who was there."""
    source = torch.Generator().manual_seed(1000 * step + 10 * replica + rank)
    size = 1.0 + 2.0 * replica + step % 3
    return torch.randn(4, 6, generator=source) * size, torch.randn(4, 4, generator=source) * size


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def policy():
    return distclip.AutoClip(window=8)


def waited(condition):
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "the others did not come"
        time.sleep(0.05)


def train(folder, replica, life, rank):
    from torchft import Manager, ProcessGroupGloo

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT_S))
    model = net()
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    # the default process group is the replica group
    clipper = distclip.GradClipper(model, policy=policy())

    def state_dict():
        return {
            "model": {n: p.to_local().detach().clone() for n, p in model.named_parameters()},
            "momentum": [
                optimizer.state[p]["momentum_buffer"].to_local().clone()
                for p in model.parameters()
                if optimizer.state
            ],
            "clipper": clipper.state_dict(),
        }

    def load_state_dict(state):
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.to_local().copy_(state["model"][name])
            for param, momentum in zip(model.parameters(), state["momentum"]):
                buffer = torch.zeros_like(param)
                buffer.to_local().copy_(momentum)
                optimizer.state[param]["momentum_buffer"] = buffer
        clipper.load_state_dict(state["clipper"])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=30)),
        load_state_dict=load_state_dict,
        state_dict=state_dict,
        min_replica_size=1,
        use_async_quorum=False,
        replica_id=f"replica_{replica}",
        timeout=timedelta(seconds=60),
        quorum_timeout=timedelta(seconds=LIMIT_S),
        hostname="localhost",
    )
    (folder / f"ready{replica}{rank}").touch()
    waited((folder / "go").exists)
    log, alone, joint, quorum, left_out = [], 0, 0, None, 0
    while joint < JOINT:
        step = manager.current_step()
        manager.start_quorum()
        step = manager.current_step()  # a group that came back has the others' step
        if quorum not in (None, manager._quorum_id):
            clipper.rebuild()  # the state stays
        quorum = manager._quorum_id
        optimizer.zero_grad()
        loss_of(model, *batch(step, replica, rank)).backward()
        if replica == 1 and life == 0 and step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        for param in model.parameters():
            manager.allreduce(param.grad.to_local()).wait()
        # before the clip: a step that is not taken is none of the policy's either
        if not manager.should_commit():
            left_out += 1
            continue
        report = clipper.step(optimizer)
        others = manager.num_participants()
        log.append(
            {
                "step": step,
                "others": others,
                "norm": float(report.total_norm),
                "threshold": float(report.threshold[0]),
                "coef": float(report.clip_coef),
                "bits": [float(report.total_norm).hex(), float(report.threshold[0]).hex()],
            }
        )
        alone += others == 1
        joint += others == GROUPS and (alone > 0 or life > 0)
        if replica == 0 and alone and others == 1:
            (folder / "alone").touch()
            time.sleep(0.2)  # the other group starts meanwhile
    params = [p.full_tensor().detach().double() for p in model.parameters()]
    said = {
        "replica": replica,
        "rank": rank,
        "log": log,
        "left_out": left_out,
        "params": float(sum(p.sum() for p in params)).hex(),
        "length": float(torch.cat([p.flatten() for p in params]).norm()),
        "clipped_steps": int(clipper.state_dict()["step"]),
    }
    (folder / f"said{replica}{rank}").write_text(json.dumps(said))
    dist.barrier()
    manager.shutdown(wait=False)
    dist.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def started(folder, replica, life, address):
    port = free_port()
    common = os.environ | {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(RANKS),
        "TORCHFT_LIGHTHOUSE": address,
    }
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(replica), str(life), str(rank)],
            env=common | {"RANK": str(rank)},
            stdout=(folder / f"out{replica}{life}{rank}").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(RANKS)
    ]


def oracle(log):
    """In one process and float64: the same steps, with the groups that were there."""
    model = net().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    clipper = distclip.GradClipper(model, policy=policy(), process_group=distclip.LOCAL)
    out = []
    for seen in log:
        optimizer.zero_grad()
        for replica in range(seen["others"]):
            for rank in range(RANKS):
                x, y = batch(seen["step"], replica, rank)
                loss = loss_of(model, x.double(), y.double())
                (loss / (seen["others"] * RANKS)).backward()
        report = clipper.step(optimizer)
        out.append([float(report.total_norm), float(report.threshold[0]), float(report.clip_coef)])
    length = torch.cat([p.detach().flatten() for p in model.parameters()]).norm()
    return {"steps": out, "length": float(length)}


def main():
    from torchft.coordination import LighthouseServer

    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        lighthouse = LighthouseServer(
            bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=200, heartbeat_timeout_ms=8000
        )
        stack.callback(lighthouse.shutdown)
        address = f"http://127.0.0.1:{lighthouse.address().rsplit(':', 1)[1]}"
        groups = [started(folder, replica, 0, address) for replica in range(GROUPS)]

        def end():
            for process in [p for group in groups for p in group]:
                process.kill()
                process.wait()

        stack.callback(end)
        try:
            waited(lambda: len(list(folder.glob("ready*"))) == GROUPS * RANKS)
            (folder / "go").touch()
            waited(lambda: all(p.poll() is not None for p in groups[1]))
            killed = [p.returncode for p in groups[1]]
            waited((folder / "alone").exists)  # one that is back at once is not missed
            groups[1] = started(folder, 1, 1, address)
            waited(lambda: all(p.poll() is not None for group in groups for p in group))
            said = [json.loads(f.read_text()) for f in sorted(folder.glob("said*"))]
            assert len(said) == GROUPS * RANKS
        except AssertionError:
            for file in sorted(folder.glob("out*")):
                print(f"== {file.name}\n{file.read_text()[-2500:]}")
            raise
        first = next(s for s in said if s["replica"] == 0)
        result = {"killed": killed, "said": said, "oracle": oracle(first["log"])}
        print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(Path(sys.argv[1]), *map(int, sys.argv[2:]))
    else:
        main()
