"""The doctor as users run it: under torchrun, with a rank that is killed, stopped, stuck or absent,
and with a clip that is wrong."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import distclip
from distclip.cli import main
from distclip.cli.doctor import facts as doctor_facts
from distclip.cli.doctor.command import CHECKS, more_ranks
from distclip.cli.doctor.layouts import LAYOUTS
from distclip.cli.doctor.output import DoctorOutput, as_json, as_table
from distclip.cli.doctor.records import CheckResult
from distclip.cli.doctor.speed_checks import SpeedCheck
from distclip.testing import fresh_process
from integrations.launched import assert_passed, launched

LOST, TIMEOUT_S = 2, 40  # many processes start at once


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def one_rank(environment, before, arguments, out):
    """A process: what `python -m distclip doctor` does, with its output in files."""
    os.environ.update(environment)
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT), fd)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    torch.set_num_threads(1)
    if before is not None:
        before()
    code = main(["doctor", *arguments])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Job:
    """Ranks started by hand, without a launcher. `before[rank]` runs first in that rank,
    `environment[rank]` is added to its own."""

    def __init__(self, tmp_path, *arguments, size=4, before=None, environment=None, absent=()):
        self.processes, self.folder, port = {}, tmp_path, free_port()
        for rank in set(range(size)) - set(absent):
            own = {
                "RANK": rank,
                "WORLD_SIZE": size,
                "LOCAL_RANK": rank,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            own = {k: str(v) for k, v in own.items()} | (environment or {}).get(rank, {})
            self.processes[rank] = fresh_process(
                one_rank, own, (before or {}).get(rank), arguments, str(tmp_path / str(rank))
            )
        for process in self.processes.values():
            process.start()

    def codes(self, *ranks, timeout=900):
        """Exit codes; all other ranks are ended then."""
        try:
            for rank in ranks:
                self.processes[rank].join(timeout)
            return [self.processes[rank].exitcode for rank in ranks]
        finally:
            self.end()

    def end(self):
        for process in self.processes.values():
            process.kill()
            process.join()

    def said(self, rank, where="out"):
        return (self.folder / f"{rank}.{where}").read_text()


@pytest.mark.usefixtures("waiting_jobs")
def test_under_torchrun_all_layouts_pass():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "4",
        "--master-port",
        str(free_port()),
    ]
    done = subprocess.run(
        [*command, "-m", "distclip", "doctor"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100 and "\x1b" not in done.stdout
    rows = {
        line.split()[0]: line.split()[1]
        for line in lines[lines.index("-" * 100) + 1 :]
        if line and line[0] != " "
    }
    measured = {"latency": "measured", "speed": "measured"}
    assert (
        rows
        == {"alike": "pass", **{check.name: "pass" for check in CHECKS}, "12": "pass,"} | measured
    )
    assert {layout.name for layout in LAYOUTS} <= set(rows)
    facts = {line[:20].strip(): line[20:] for line in lines[: lines.index("")]}
    assert facts["ranks"] == "4" and facts["nodes"] == f"{socket.gethostname()}: ranks 0-3"
    assert facts["kernel"] == distclip.kernels.active()
    assert (
        facts["torch"] == torch.__version__
        and facts["backend"] == "gloo"
        and "AdamW" in facts["fused"]
    )
    assert done.stdout.count("equal bits on 4 ranks, 1 all_reduce") == len(LAYOUTS)


def test_one_process(capsys):
    assert (
        main(["doctor", "--json", "--only", "copies", "--only", "ddp", "--only", "overflow"]) == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert [(c["name"], c["result"]) for c in document["checks"]] == [
        ("alike", "pass"),
        ("copies", "pass"),
        ("ddp", "not run"),
        ("overflow", "pass"),
    ]
    assert document["checks"][2]["seen"] == "needs at least 2 ranks; there is 1"
    assert document["exit_code"] == 0 and document["world"] == 1
    assert document["hint"] == (
        "1 check needs more ranks than 1: torchrun --nproc-per-node 2 -m distclip doctor"
    )


def test_how_more_checks_are_run_is_told():
    assert more_ranks(CHECKS, 1) == (
        "10 checks need more ranks than 1: torchrun --nproc-per-node 4 -m distclip doctor"
    )
    assert more_ranks(CHECKS, 3) == (
        "2 checks need more ranks than 3: torchrun --nproc-per-node 4 -m distclip doctor"
    )
    assert more_ranks(CHECKS, 4) == ""
    findings = DoctorOutput(
        [{"host": "n1"}],
        [CheckResult("ddp", "not run", "needs at least 2 ranks; there is 1")],
        hint=more_ranks(CHECKS, 1),
    )
    assert as_table(findings).splitlines()[-2:] == ["1 not run", findings.hint]


def test_the_speed_line_compares_work_with_work():
    def seen(idle, active):
        return {
            "megabytes": 50.4,
            "idle": dict(zip(("all", "alone", "torch"), idle)),
            "active": dict(zip(("all", "alone", "torch"), active)),
        }

    one = seen((0.008, 0.004, 0.0041), (0.012, 0.009, 0.0085))
    alike = "50 MB on each rank: nothing to clip 4.0 ms, torch 4.1 ms; clipped 9.0 ms, torch 8.5 ms"
    assert SpeedCheck().judge([one]).seen == alike
    assert SpeedCheck().judge([one, seen((0.009, 0.003, 0.004), (0.011, 0.008, 0.008))]).seen == (
        f"{alike}. This is the work on one rank: torch's function sends nothing here. With the "
        f"all_reduce of a clip 9.0 ms and 12.0 ms"
    )


def test_the_json_has_what_the_table_has():
    one = {"host": "n1", "device id": "", "torch": "2.13.0", "threads": 1}
    findings = DoctorOutput(
        [one, one | {"host": "n2", "threads": 8}],
        [CheckResult("ddp", "fail", "seen " * 40, "remedy " * 30)],
        "a rank is lost",
    )
    document, table = json.loads(as_json(findings)), as_table(findings)
    words = table.split()
    for row in document["checks"]:
        assert row["name"] in words and row["result"] in words
        assert words.count("seen") == 41 and words.count("remedy") == 30
    assert (
        document["facts"]["threads"] == {"1": "rank 0", "8": "rank 1"}
        and "1 (rank 0), 8 (rank 1)" in table
    )
    assert document["nodes"] == "n1: rank 0, n2: rank 1" and document["nodes"] in table
    assert document["stopped"] in table and document["exit_code"] == 2
    assert max(map(len, table.splitlines())) <= 100


def test_a_rank_with_another_environment_is_named(tmp_path):
    job = Job(tmp_path, "--json", "--only", "ddp", environment={3: {"OMP_NUM_THREADS": "7"}})
    assert job.codes(0, 1, 2, 3) == [1] * 4
    alike, ddp = json.loads(job.said(0))["checks"]
    assert alike["result"] == "fail" and ddp["result"] == "pass"
    assert alike["seen"] == "OMP_NUM_THREADS: 1 on ranks 0-2, 7 on rank 3"
    assert alike["do"] == "OMP_NUM_THREADS: set it to one value on every rank, or unset it"
    assert [job.said(rank) for rank in (1, 2, 3)] == [""] * 3


def test_other_differences_are_named():
    one = dict.fromkeys(doctor_facts.MUST_MATCH, "x") | {
        "host": "n1",
        "device": "cuda:0 A",
        "device id": "",
        "backend": "nccl",
    }
    other = one | {"host": "n2", "torch": "2.12.1"}
    assert doctor_facts.judge_facts([one, one, other]).seen == (
        "torch: x on ranks 0-1 (n1), 2.12.1 on rank 2 (n2)"
    )
    gpu = one | {"device id": "GPU-1"}
    assert doctor_facts.judge_facts([gpu, gpu]).seen == "ranks 0-1 share one GPU (cuda:0 A on n1)"
    assert doctor_facts.judge_facts([gpu, gpu | {"device id": "GPU-2"}]).result == "pass"
    assert doctor_facts.cannot_start([one, other | {"backend": "gloo"}]) == (
        "ranks would use different backends: nccl on rank 0 (n1), gloo on rank 1 (n2). "
        "See why some have no CUDA device, or pass --backend gloo"
    )


def patch_clip(instead):
    original = distclip.GradClipper.clip_

    def clip_(self, *args, **kwargs):
        instead()
        return original(self, *args, **kwargs)

    distclip.GradClipper.clip_ = clip_


def send(number):
    os.kill(os.getpid(), number)


STUCK = partial(time.sleep, 3600)  # longer than anybody waits
FAULTS = {
    "killed": (partial(send, signal.SIGKILL), "no sign of life"),
    "stopped": (partial(send, signal.SIGSTOP), "no sign of life"),
    "stuck": (STUCK, "alive"),
}


@pytest.fixture(scope="module")
def waiting_jobs(tmp_path_factory):
    """All jobs that wait for a rank, at once, by name. They do so while other tests run: the first
    test of this file starts them, the last ones ask what became of them."""

    def job(name, *arguments, **options):
        return Job(
            tmp_path_factory.mktemp(name), *arguments, "--timeout", str(TIMEOUT_S), **options
        )

    jobs = {
        name: job(
            name,
            "--json",
            "--only",
            "copies",
            "--only",
            "fsdp2",
            before={LOST: partial(patch_clip, does)},
        )
        for name, (does, _) in FAULTS.items()
    }
    waits, stops = partial(patch_clip, STUCK), partial(patch_clip, FAULTS["stopped"][0])
    jobs["waiting"] = job(
        "waiting", "--only", "copies", size=3, before={0: waits, 1: waits, 2: stops}
    )
    jobs["holder stopped"] = job("holder", "--only", "copies", size=3, before={0: stops})
    jobs |= {
        f"without {rank}": job(f"without{rank}", "--only", "copies", size=3, absent=[rank])
        for rank in (0, 2)
    }
    yield jobs
    for started in jobs.values():
        started.end()


@pytest.fixture(scope="module")
def lost(waiting_jobs):
    """Name → (job, exit codes)."""
    survivors = {
        "waiting": [0, 1],
        "holder stopped": [1, 2],
        "without 0": [1, 2],
        "without 2": [0, 1],
    }
    return {
        name: (job, job.codes(*survivors.get(name, (0, 1, 3))))
        for name, job in waiting_jobs.items()
    }


def test_a_rank_killed_under_torchrun_is_named(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\nimport distclip\nfrom distclip.cli import main\n\n"
        "def clip_(self): os.kill(os.getpid(), signal.SIGKILL)\n\n"
        "if os.environ['RANK'] == '1': distclip.GradClipper.clip_ = clip_\n"
        "sys.exit(main(['doctor', '--only', 'copies']))\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 1
    assert "Did not answer: rank 1 on" in done.stderr and "Did not answer: rank 1 on" in " ".join(
        done.stdout.split()
    )


def wrong_norm():
    original = distclip.GradClipper.clip_

    def clip_(self, *args, **kwargs):
        report = original(self, *args, **kwargs)
        report.total_norm.mul_(1.5)
        return report

    distclip.GradClipper.clip_ = clip_


def second_collective():
    original = distclip.GradClipper.clip_

    def clip_(self, *args, **kwargs):
        torch.distributed.all_reduce(torch.zeros(3))
        return original(self, *args, **kwargs)

    distclip.GradClipper.clip_ = clip_


def never_scales():
    original = distclip.GradClipper.clip_

    def clip_(self, *args, **kwargs):
        report = original(self, *args, **kwargs)
        for p in self._stages.inputs.members:
            if p.grad is not None:
                p.grad.mul_(2)
        return report

    distclip.GradClipper.clip_ = clip_


def never_skips():
    def step(self, *optimizers, **kwargs):
        report = self.measure()
        nn.utils.clip_grad_norm_(self._stages.inputs.members, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        return report

    distclip.GradClipper.step = step


def raises():
    def clip_(self):
        raise distclip.ConfigError("one rank alone refuses")

    distclip.GradClipper.clip_ = clip_


def test_a_broken_clip_fails(tmp_path):
    def checks(name, ranks, broken, *only):
        folder = tmp_path / name
        folder.mkdir()
        job = Job(
            folder,
            "--json",
            *(word for check in only for word in ("--only", check)),
            size=2,
            before=dict.fromkeys(ranks, broken),
        )
        assert job.codes(0, 1) == [1, 1], job.said(0, "err") + job.said(0)
        return {check["name"]: check for check in json.loads(job.said(0))["checks"]}

    found = checks("norm", [1], wrong_norm, "ddp", "stages")
    assert (
        found["ddp"]["result"] == found["stages"]["result"] == "fail"
        and found["alike"]["result"] == "pass"
    )
    assert (
        "on rank 1, the oracle's" in found["ddp"]["seen"]
        and "norm bits with p = 2: 0x" in found["ddp"]["seen"]
    )
    assert "report it" in found["ddp"]["do"]
    found = checks("collective", [0, 1], second_collective, "fsdp2")
    assert (
        "ranks 0-1 sent ['allreduce_', 'allreduce_'] with p = 2, not ['allreduce_']"
        in found["fsdp2"]["seen"]
    )
    found = checks("scale", [0, 1], never_scales, "tp")
    assert "gradients on ranks 0-1 are not coefficient × before" in found["tp"]["seen"]
    found = checks("skip", [0, 1], never_skips, "overflow")
    assert "the step was not reported as skipped on ranks 0-1" in found["overflow"]["seen"]
    assert "parameters or optimizer state changed on" in found["overflow"]["seen"]
    found = checks("raise", [0, 1], raises, "copies", "overflow")
    assert "ConfigError: one rank alone refuses" in found["copies"]["seen"]
    assert found["overflow"]["result"] == "pass", (
        "all ranks raised alike: the group is still of use"
    )


def test_the_options(capsys, monkeypatch):
    assert main(["doctor", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        check.name for check in CHECKS
    ]
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--only", "nothing"])
    assert (
        "'nothing' is no check; the checks are copies, ddp, fsdp1, fsdp2,"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--timeout", "0"])
    assert "0 is not a number of seconds above 0" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["doctor", "--help"])
    assert (
        "exit codes:  0  all checks passed    1  a check failed    2  it could not run to the end"
        in capsys.readouterr().out
    )
    monkeypatch.setenv("RANK", "0")
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == (
        "distclip doctor: RANK are set, but not MASTER_ADDR, MASTER_PORT, WORLD_SIZE; start with "
        "torchrun, or set all four on every rank\n"
    )


def test_a_kernel_that_is_not_here_is_told(capsys, monkeypatch):
    monkeypatch.setenv("DISTCLIP_KERNELS", "other")
    assert main(["doctor"]) == 2
    assert "DISTCLIP_KERNELS='other' is neither 'native' nor 'torch'" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_backend_that_is_not_here_is_told(capsys):
    if torch.cuda.is_available():
        pytest.skip("NCCL is here")
    assert main(["doctor", "--backend", "nccl"]) == 2
    assert "stopped: rank 0 on" in (said := capsys.readouterr().out)
    assert "has no CUDA device or no NCCL; --backend gloo runs on the CPU" in " ".join(said.split())


def test_a_frameworks_smallest_training_is_compared():
    names = ("accelerate", "deepspeed", "lightning", "transformers")
    for name in names:
        if find_spec(name) is None:  # importing it would change the environment
            pytest.skip(f"{name} is not installed")
    [seen] = launched("doctor_jobs.py", "cpu", *names, ranks=0, timeout=600)
    passed = {"norm": "pass", "weights": "pass", "own": "pass"}
    for name in names:
        assert_passed(seen[name], passed)
    loose = seen["accelerate"]["loose"]
    assert loose["code"] == 1
    assert loose["results"]["weights"] == "fail" and loose["results"]["own"] == "pass"


@pytest.mark.parametrize(
    "name, what",
    [
        ("megatron", "a CUDA device and there is none here. Run this where one is; or run a few"),
        (
            "torchtitan",
            "an accelerator and there is none here. Run this where one is; or run a few",
        ),
    ],
)
def test_what_to_do_for_a_framework_that_needs_a_gpu(capsys, name, what):
    if torch.accelerator.is_available():
        pytest.skip("it is run here")
    assert main(["doctor", "--framework", name, "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert what in document["stopped"] and "must agree" in document["stopped"]
    assert document["checks"] == [] and document["exit_code"] == 2


def test_a_framework_that_is_not_known_or_under_torchrun(capsys, monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--framework", "keras"])
    assert "choose from" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor", "--framework", "accelerate"]) == 2
    assert "run it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lost_rank_is_named_with_the_collective(lost, fault):
    job, codes = lost[fault]
    assert codes == [2, 2, 2], job.said(0, "err")
    texts = [job.said(rank, "err") for rank in (0, 1, 3)]
    named = [
        text
        for text in texts
        if f"Did not answer: rank {LOST} on {socket.gethostname()} ({FAULTS[fault][1]}" in text
    ]
    assert texts[0] in named and len(named) >= 2, texts
    assert "copies: clip_ with p = 2 (all_reduce of" in texts[0]
    document = json.loads(job.said(0))
    assert document["exit_code"] == 2 and f"rank {LOST}" in document["stopped"]
    assert [(c["name"], c["result"]) for c in document["checks"]] == [
        ("alike", "pass"),
        ("copies", "not run"),
        ("fsdp2", "not run"),
    ]


def test_a_collective_without_a_timeout_is_ended_by_the_watch(lost):
    """As with NCCL: the main thread waits for a device for ever."""
    job, codes = lost["waiting"]
    assert codes == [2, 2]
    for rank in (0, 1):
        said = job.said(rank, "err")
        assert "'copies: clip_ with p = 2 (all_reduce of" in said
        assert (
            f"did not end within {TIMEOUT_S} s. Did not answer: rank 2 on {socket.gethostname()} "
            f"(no sign of life; last in" in said
        )
        assert said.count("no sign of life") == 1, "the other survivor is alive, also while it asks"
    assert "stopped: rank 0 on" in job.said(0)


def test_a_rank_that_never_starts_is_named(lost):
    job, codes = lost["without 2"]
    assert codes == [2, 2]
    assert "Did not answer: rank 2 (it never started, or cannot reach 127.0.0.1:" in job.said(
        0, "err"
    )


def test_a_stopped_rank_that_holds_the_store_is_named(lost):
    """The store answers nothing then, and has no time-out of its own."""
    job, codes = lost["holder stopped"]
    assert codes == [2, 2]
    for rank in (1, 2):
        said = job.said(rank, "err")
        assert (
            "does not answer, and rank 0 holds it: did not answer: rank 0" in said
            and "copies: clip_ with p = 2 (all_reduce of" in said
        )


def test_without_the_rank_that_holds_the_store(lost):
    job, codes = lost["without 0"]
    assert codes == [2, 2]
    said = job.said(1, "err")
    assert (
        said.startswith("distclip doctor: rank 1 on")
        and "did not reach the store at 127.0.0.1:" in said
        and "rank 0 opens it" in said
    )
