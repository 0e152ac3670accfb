"""Built where a C compiler is, pure Python where none is; a stale library is never loaded; the
reader is told which one serves."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from distclip import kernels
from distclip.errors import ConfigError
from distclip.kernels import build, native

ROOT = Path(__file__).parents[2]
COMPILER = build.find_compiler()
# Writes an empty file where a compiler would have written the library.
FAKE = f'{sys.executable} -c \'import sys; open(sys.argv[sys.argv.index("-o") + 1], "w")\''
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")
CLIP = """
import torch, distclip
from distclip import kernels
torch.set_num_threads(2)
print(kernels.active(), kernels.__file__)
weight = torch.nn.Parameter(torch.zeros(1 << 20))
weight.grad = torch.full((1 << 20,), 3.0)
print(distclip.GradClipper([("weight", weight)], max_norm=1.0).clip_().total_norm.item(), weight.grad.norm().item())
"""


@pytest.fixture
def choose(monkeypatch):
    """Sets DISTCLIP_KERNELS, or unsets it."""
    monkeypatch.delenv(kernels.CHOICE, raising=False)
    return lambda value: monkeypatch.setenv(kernels.CHOICE, value)


@pytest.fixture
def library_is(monkeypatch):
    """`library_is(answer)`: what loading the library came to."""

    def answer(found):
        monkeypatch.setattr(kernels, "load_library", lambda: found)

    return answer


def environment(path=None):
    env = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", kernels.CHOICE)
    }
    return env if path is None else {**env, "PATH": path}


@needs_compiler
def test_a_built_tree_is_served_by_the_native_kernels(choose):
    assert (build.HERE / build.library_name()).exists(), "run python -m distclip.kernels.build"
    assert kernels.active() == "native"
    choose("native")
    assert kernels.active() == "native"
    assert kernels.plan_for((3,), (torch.float32,), torch.device("cpu")) is not None


def test_torch_can_be_forced(choose):
    choose("torch")
    assert kernels.active() == "torch (DISTCLIP_KERNELS=torch)"
    assert kernels.plan_for((3,), (torch.float32,), torch.device("cpu")) is None


def test_other_choices_are_refused(choose):
    choose("fast")
    with pytest.raises(
        ConfigError,
        match="DISTCLIP_KERNELS='fast' is neither 'native' nor "
        "'torch'; unset it to have distclip choose",
    ):
        kernels.active()


def test_no_library(choose, library_is):
    library_is("no compiled library")
    assert kernels.active() == "torch (no compiled library)"
    assert kernels.plan_for((3,), (torch.float32,), torch.device("cpu")) is None
    choose("native")
    with pytest.raises(
        ConfigError,
        match="DISTCLIP_KERNELS=native, but there are no native kernels: no compiled library",
    ):
        kernels.active()


def test_dtypes_and_devices_that_it_does_not_know(choose):
    assert kernels.plan_for((3,), (torch.float8_e5m2,), torch.device("cpu")) is None
    assert kernels.plan_for((3,), (torch.float32,), torch.device("meta")) is None


def found_in(folder, monkeypatch):
    """What loading answers where the package lies in `folder`."""
    monkeypatch.setattr(build, "HERE", folder)
    monkeypatch.setattr(native, "__file__", str(folder / "native.py"))
    return native.load_library.__wrapped__()


@needs_compiler
def test_a_stale_or_broken_library_is_not_loaded(tmp_path, monkeypatch):
    for source in build.SOURCES:
        shutil.copy(build.HERE / source, tmp_path)
    name = build.library_name()
    assert found_in(tmp_path, monkeypatch) == "no compiled library"
    (tmp_path / name).write_bytes(b"no library at all")
    assert found_in(tmp_path, monkeypatch).startswith("the compiled library cannot be loaded: ")
    (tmp_path / "clip.c").write_text((tmp_path / "clip.c").read_text() + "/* changed */\n")
    stale = found_in(tmp_path, monkeypatch)
    assert stale == (
        "the compiled library is of other sources than these: run python -m distclip.kernels.build"
    )


def test_compiling_replaces_the_old(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", FAKE)
    old, other = (
        tmp_path / f"libdistclip-{build.PLATFORM}-0.so",
        tmp_path / "libdistclip-plan9-z80-0.so",
    )
    old.touch()
    other.touch()
    made = build.compile_into(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([made, other])


def test_what_the_compiler_says_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", f"{sys.executable} -c 'import sys; sys.exit(\"no space left\")'")
    with pytest.raises(RuntimeError, match=r"(?s)the C compiler failed \(.*\):\nno space left"):
        build.compile_into(tmp_path)
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(RuntimeError, match="no C compiler was found"):
        build.compile_into(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The project's sources without what was built or is ignored."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(
        ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    # a stale one must not get into a wheel
    (folder / "src/distclip/kernels" / f"libdistclip-{build.PLATFORM}-0.so").touch()
    return folder


def wheel_of(tree, folder, env):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(folder),
        str(tree),
    ]
    subprocess.run(command, env=env, check=True, timeout=900, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    libraries = [
        Path(name).name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")
    ]
    target = folder / "installed"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(command, env=env, check=True, timeout=900, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CLIP],
        env={**env, "PYTHONPATH": str(target)},
        cwd=folder,
        timeout=900,
        capture_output=True,
        text=True,
    )
    assert done.stderr == "" and done.returncode == 0
    active, norms = done.stdout.splitlines()
    assert active.endswith(f" {target / 'distclip/kernels/__init__.py'}")
    assert [float(norm) for norm in norms.split()] == pytest.approx([3072, 1], rel=1e-5)
    return wheel.name, libraries, active.rsplit(" ", 1)[0]


@needs_compiler
def test_wheel_with_a_compiler(tree, tmp_path):
    name, libraries, active = wheel_of(tree, tmp_path, environment())
    assert name.startswith("distclip-") and "-py3-none-" in name and not name.endswith("-any.whl")
    assert libraries == [build.library_name()]
    assert active == "native"


def test_wheel_without_a_compiler(tree, tmp_path):
    (tmp_path / "bin").mkdir()
    name, libraries, active = wheel_of(
        tree, tmp_path, environment(str(tmp_path / "bin")) | {"CC": ""}
    )
    assert name.endswith("-py3-none-any.whl")
    assert libraries == []
    assert active == "torch (no compiled library)"


def test_an_editable_install_builds_beside_the_sources(tree, tmp_path):
    build_editable = "import sys, hatchling.build as b; b.build_editable(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build_editable, str(tmp_path)],
        cwd=tree,
        env=environment() | {"CC": FAKE},
        check=True,
        timeout=900,
    )
    assert [path.name for path in (tree / "src/distclip/kernels").glob("*.so")] == [
        build.library_name()
    ]
    (wheel,) = tmp_path.glob("*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
