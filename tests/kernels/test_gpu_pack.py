"""`launch/gpu.sh` and the GPU benchmark, as far as they go without a device."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmarks import gpu_problems
from benchmarks.__main__ import main as benchmarks
from benchmarks.floors import GPU_CEILINGS, GPU_FLOORS, gpu_floor
from benchmarks.gpu_cases import CASES
from benchmarks.gpu_peers import TORCH, peers
from benchmarks.records import Row, Spread

ROOT = Path(__file__).parents[2]
WITHOUT = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def pack(*arguments, timeout=200):
    """`launch/gpu.sh`: return code and output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "PYTHON": sys.executable
    }
    command = [str(ROOT / "launch" / "gpu.sh"), *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("gpu_pack", ROOT / "launch" / "gpu.py")
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_pack", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_dry_run_does_what_needs_no_device_and_lists_the_rest(tmp_path):
    folder = tmp_path / "results"
    code, said = pack("--dry", folder)
    assert code == 0, said
    found = json.loads((folder / "gpu.json").read_text())
    assert found["benchmark"] is None
    results = {part["name"]: part["result"] for part in found["parts"]}
    assert (
        results
        == {
            "versions and device": "passed",
            "tests collected": "passed",
            "pytest -m gpu": "not run",
            "distclip doctor, NCCL, 1 rank": "not run",
            "benchmark": "not run",
            "picture": "not run",
        }
        or torch.cuda.is_available()
    )
    assert f"torch {torch.__version__}" in said and "needs a CUDA device" in said
    assert sum(line.split("  ")[0] in results for line in said.splitlines()) == len(results), (
        "one table"
    )
    page = (folder / "gpu.md").read_text()
    assert all(f"| {name} | {result} |" in page for name, result in results.items())


@WITHOUT
def test_without_a_device_it_fails_and_says_what_to_do(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path)])
    monkeypatch.setattr(
        script,
        "versions",
        lambda: (script.Outcome("versions and device", "passed", "no CUDA device"), []),
    )
    assert script.main() == 1
    assert "launch/gpu.sh --dry runs what needs none" in capsys.readouterr().out
    assert {
        part["result"] for part in json.loads((tmp_path / "gpu.json").read_text())["parts"]
    } == {"passed", "failed"}


def test_a_part_that_fails_or_lasts_too_long_hides_nothing_that_follows(
    script, monkeypatch, tmp_path, capsys
):
    def part(name, code, limit=60):
        return script.Part(name, [sys.executable, "-c", code], limit, script.last_line)

    chosen = [
        part("wrong", "print('seen before'); raise SystemExit(3)"),
        part(
            "stuck",
            "import subprocess, time; subprocess.Popen(['sleep', '600']); print('begun', "
            "flush=True); time.sleep(600)",
            limit=5,
        ),
        part("right", "print('one'); print('= 5 passed =')"),
    ]
    monkeypatch.setattr(
        script,
        "versions",
        lambda: (script.Outcome("versions and device", "passed", "a device"), ["a device"]),
    )
    monkeypatch.setattr(script, "parts", lambda folder, ranks, dry: chosen)
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path)])
    assert script.main() == 1
    parts = {
        part["name"]: part for part in json.loads((tmp_path / "gpu.json").read_text())["parts"]
    }
    assert (
        parts["wrong"]["figure"] == "exit code 3: seen before"
        and parts["wrong"]["result"] == "failed"
    )
    assert (
        parts["stuck"]["figure"] == "not done within 5 s" and parts["stuck"]["output"] == "begun\n"
    )
    assert (parts["right"]["result"], parts["right"]["figure"]) == ("passed", "5 passed")
    assert (
        "seen before" in (tmp_path / "gpu.md").read_text() and "5 passed" in capsys.readouterr().out
    )


def test_all_parts_together_end_within_8_minutes(script, tmp_path):
    chosen = script.parts(tmp_path, 2, dry=False)
    assert 60 + sum(part.limit_s for part in chosen) <= 480
    assert [part.name for part in chosen] == [
        "pytest -m gpu",
        "distclip doctor, NCCL, 2 ranks",
        "benchmark",
        "picture",
    ]
    assert script.checks("x\n15 pass, 2 measured, 1 not run\ny") == "15 pass, 2 measured, 1 not run"
    assert script.reached(
        "7 of 9 floors reached; of 5 other comparisons 1 slower than the peer. The value"
    ) == ("7 of 9 floors reached; of 5 other comparisons 1 slower")


@WITHOUT
def test_the_benchmark_says_that_there_is_no_device():
    with pytest.raises(SystemExit, match="needs a CUDA device, and torch sees none here"):
        benchmarks(["--device", "cuda"])


def test_options_for_the_cpu_are_refused():
    with pytest.raises(SystemExit, match="--kernels and --keep are for the CPU"):
        benchmarks(["--device", "cuda", "--kernels", "native"])


def test_the_problems_are_those_that_are_named():
    sizes = {
        name: sum(torch.Size(shape).numel() for shape in shapes(False))
        for name, shapes in (("llama", gpu_problems.llama),)
    }
    assert sizes["llama"] == gpu_problems.LLAMA == 1_536_066_816
    matrices = gpu_problems.mixed(False)
    assert len(matrices) == 500 and abs(sum(a * b for a, b in matrices) / 225e6 - 1) < 0.01
    assert {key.split(",")[0].split()[0] for key in GPU_FLOORS} <= set(CASES)
    assert gpu_floor("llama idle") == {"floor": 2.7, "issue": True} and gpu_floor("gpt2 idle") == {
        "floor": 1.0,
        "issue": False,
    }
    assert GPU_CEILINGS["launches"] == 12


def test_peers_that_are_not_installed_are_named():
    found, missing = peers()
    assert TORCH in found and len(found) + len(missing) == 4
    assert all(": not measured (" in text for text in missing)


def test_what_was_measured_becomes_a_page_that_names_the_card(tmp_path, capsys):
    spread = Spread(2.0, 1.5, 2.5, 9)
    rows = [
        Row(
            "small",
            "5,000 idle",
            spread,
            "x",
            "GradClipper.clip_",
            TORCH,
            spread,
            spread,
            3.0,
            issue=True,
            kernels="triton",
            main=True,
        ),
        Row(
            "call",
            "1,000 tensors: launches",
            Spread.of([54.0]),
            "launches",
            "clip_",
            floor=12.0,
            at_least=False,
            issue=True,
        ),
    ]
    card = {
        "device": "Some card",
        "processors": 132,
        "memory_gib": 139,
        "capability": "9.0",
        "torch": "2",
        "triton": "3",
    }
    card |= {"read_gb_s": [4000.0, 3900.0, 4100.0], "read_write_gb_s": [3000.0, 2900.0, 3100.0]}
    found = {
        "quick": False,
        "device": "cuda",
        "machine": card,
        "missing": ["Another: not measured (ImportError)"],
    }
    source, target, picture = (
        tmp_path / "found.json",
        tmp_path / "RESULTS_GPU.md",
        tmp_path / "found.png",
    )
    source.write_text(json.dumps(found | {"rows": [row.to_dict() for row in rows]}))
    assert (
        benchmarks(
            [
                "--device",
                "cuda",
                "--read",
                str(source),
                "--write",
                str(target),
                "--plot",
                str(picture),
            ]
        )
        == 0
    )
    page, said = target.read_text(), capsys.readouterr().out
    for text in (page, said):
        assert (
            "Some card" in text
            and "reads 4,000 GB/s" in text
            and "Another: not measured" in text
            and "0 of 2 floors reached" in text
        )
    assert (
        "| 5,000 idle | `GradClipper.clip_` |" in page
        and "not reached |" in page
        and "(found.png)" in page
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
