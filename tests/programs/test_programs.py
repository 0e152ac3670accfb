"""Small training programs of other packages, with their own clipping and with distclip's lines in its
place: the same losses, step by step. `launch/programs.sh` makes their environment and runs them; what
it finds stands in docs/compatibility.md."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STEPS = 20
# program: (the packages it is about; ranks, 0 where no launcher starts them)
PROGRAMS = {
    "torchtitan_llama": (("torchtitan",), 2),
    "trainer_llama": (("transformers", "accelerate"), 2),
    "trl_sft_lora": (("trl", "peft"), 0),
    "accelerate_bert": (("accelerate", "transformers"), 2),
    "lightning_demo": (("lightning",), 0),
    "timm_vit": (("timm",), 0),
    "torchrec_dlrm": (("torchrec",), 0),
}
pytestmark = pytest.mark.slow


def ran(program, how, ranks):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = str(HERE / f"{program}.py")
    command = [sys.executable, *(launcher if ranks else []), script, how]
    source = str(HERE.parents[1] / "src")
    environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=environment, check=False
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-2000:]}\n{done.stderr[-5000:]}"
    (told,) = done.stdout.split("RESULT ")[1:]
    return json.JSONDecoder().raw_decode(told)[0]


def changed_lines(program):
    """What the user writes, imports included."""
    text = (HERE / f"{program}.py").read_text()
    return sum(line.endswith("  # distclip") for line in text.splitlines())


def apart(own, ours):
    """The largest relative difference of a step."""
    return max(abs(a - b) / abs(a) for a, b in zip(own, ours, strict=True))


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_losses_are_the_programs_own(program, record_property):
    packages, ranks = PROGRAMS[program]
    try:
        versions = {package: version(package) for package in packages}
    except PackageNotFoundError as error:
        pytest.skip(f"{error.name} is not installed: launch/programs.sh does")
    own, ours = (ran(program, how, ranks) for how in ("own", "distclip"))
    assert len(own["losses"]) == len(ours["losses"]) == STEPS
    assert len(set(own["losses"])) > STEPS // 2, "vacuous"
    losses = apart(own["losses"], ours["losses"])
    norms = apart(own["norms"], ours["norms"]) if own["norms"] else None
    lines = changed_lines(program)
    found = {"ranks": max(ranks, 1), "versions": versions, "steps": STEPS, "lines": lines}
    record_property("program", json.dumps(found | {"losses": losses, "norms": norms}))
    assert losses <= 1e-5
    assert norms is None or norms <= 2e-4  # torch's own norm on a CPU is that far off
    assert 1 <= lines <= 3
