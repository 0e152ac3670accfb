"""What importing distclip pulls in, counted in modules; and that its names are all there although
they come late."""

import pickle
import subprocess
import sys

import pytest

import distclip

SHOW = "import sys; {}; print(*sys.modules, sep='\\n')"
STANDARD = set(sys.stdlib_module_names)


def loaded(statement):
    """Modules that a fresh interpreter has after a statement, but for Python's own."""
    done = subprocess.run(
        [sys.executable, "-c", SHOW.format(statement)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name for name in done.stdout.split() if name.split(".")[0] not in STANDARD}


@pytest.fixture(scope="module")
def empty():
    """What the environment itself loads at start."""
    return loaded("pass")


def test_the_package_alone_imports_nothing(empty):
    assert loaded("import distclip; distclip.__version__") - empty == {"distclip"}


def test_its_names_bring_torch_and_no_more_of_torch_than_torch_itself_imports(empty):
    """torch.distributed.tensor and FSDP take as long to import as all the rest of torch."""
    here = loaded("import distclip; distclip.GradClipper, distclip.clip_grad_norm_")
    torch_itself = loaded("import torch")
    assert "distclip.clipper" in here
    assert {
        name for name in here - torch_itself - empty if name.split(".")[0] != "distclip"
    } == set()
    assert loaded("import torch.distributed.tensor") - torch_itself, (
        "vacuous: torch imports it by itself"
    )


COMMANDS = {
    "--help": 0, "--version": 0, "": 2, "reprot": 2, "report --help": 0, "suggest --help": 0, "doctor --help": 0,
    "report": 2, "report x --out": 2, "suggest --jsn": 2, "doctor --timeout abc": 2, "doctor --backend mpi": 2,
}  # fmt: skip


def test_help_and_refusals_of_the_command_wait_for_nothing(empty):
    program = f"""
from distclip.cli import main
for line in {list(COMMANDS)!r}:
    try:
        main(line.split())
    except SystemExit as end:
        assert end.code == {COMMANDS!r}[line], (line, end.code)
    else:
        raise AssertionError(line)
"""
    done = subprocess.run(
        [sys.executable, "-c", program + "import sys; print(*sys.modules, sep='\\n', "
                                         "file=sys.stderr)"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("usage: distclip") == 4
        and f"distclip {distclip.__version__}" in done.stdout
    )
    modules = {
        line
        for line in done.stderr.splitlines()
        if line and " " not in line and line.split(".")[0] not in STANDARD
    }
    assert modules - empty == {"distclip", "distclip.cli", "distclip.cli.arguments"}


def test_all_names_are_there():
    names = {}
    exec("from distclip import *", names)
    assert (
        set(distclip.__all__) == names.keys() - {"__builtins__"}
        and len(set(distclip.__all__)) == len(distclip.__all__) > 40
    )
    assert "clipper" in vars(distclip), "vacuous: Python puts imported files there"
    modules = {"errors", "integrations", "kernels", "testing", "versions"}
    shown = {name for name in dir(distclip) if not name.startswith("__")}
    assert shown == set(distclip.__all__) | modules, "nothing else is offered"
    assert all(getattr(distclip, name).__name__ == f"distclip.{name}" for name in modules)
    for name in distclip.__all__:
        assert getattr(distclip, name) is names[name]
    assert distclip.testing.World is sys.modules["distclip.testing"].World, (
        "files are there without an import of their own"
    )


def test_a_misspelt_name_is_told():
    with pytest.raises(
        AttributeError, match=r"^module 'distclip' has no attribute 'GradCliper'"
    ) as error:
        distclip.GradCliper  # noqa: B018
    assert error.value.name == "GradCliper" and error.value.obj is distclip, (
        "what Python's own suggestion is made from"
    )
    with pytest.raises(ImportError, match="cannot import name 'GradCliper' from 'distclip'"):
        exec("from distclip import GradCliper", {})
    for name in ("_nothing", "__nothing__"):
        with pytest.raises(AttributeError, match=name):
            getattr(distclip, name)


def test_records_are_pickled_into_a_process_that_imported_nothing():
    data = pickle.dumps(
        [distclip.Culprit("w", 3, "NaN"), distclip.FixedNorm(2.0), distclip.GradClipper]
    )
    program = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", program, data.hex()],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout.startswith(
        "[Culprit(parameter='w', rank=3, kind='NaN', before=None, after=None), "
        "FixedNorm(max_norm=2.0), <class 'distclip.clipper"
    )


@pytest.mark.parametrize(
    "file", ["measure.gradient_cache", "records", "cli.run_log", "policies.zclip"]
)
def test_any_file_can_be_the_first_that_is_imported(file):
    assert f"distclip.{file}" in loaded(f"import distclip.{file}")
