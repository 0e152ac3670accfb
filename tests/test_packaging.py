"""What a user installs: its metadata, what it does to the torch that is there, what a release
holds; and that files for other programs are of their kind."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import distclip

ROOT = Path(__file__).parents[1]


def program(*command, **environment):
    # of pip's settings none, which may name constraints and places of packages
    here = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    here |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True, text=True, timeout=300, check=False, cwd=ROOT, env=here | environment,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    code, said, error = program("launch/release.py", "build", folder)
    assert code == 0, said + error
    return folder


def test_a_release_is_checked(dist):
    code, said, error = program("launch/release.py", "check", dist)
    assert code == 0, error
    assert re.search(
        rf"^distclip-{re.escape(distclip.__version__)}-py3-none-.*\.whl: \d+ files", said
    )


def test_the_check_of_a_release_can_fail(dist, tmp_path):
    for file in dist.iterdir():
        (tmp_path / file.name.replace("none-", "none-any-")).write_bytes(file.read_bytes())
    code, _, error = program("launch/release.py", "check", tmp_path)
    assert code == 1 and "AssertionError" in error


@pytest.fixture
def environment(tmp_path):
    """A new one in which `torch` of any release seems to be installed, by its metadata alone."""
    venv.create(tmp_path / "environment", with_pip=False)
    (site,) = (tmp_path / "environment").glob("lib/python*/site-packages")

    def resolve(wheel, torch):
        info = site / f"torch-{torch}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n")
        (info / "INSTALLER").write_text("pip\n")
        (info / "RECORD").write_text("")
        command = (
            "-m",
            "pip",
            "--python",
            tmp_path / "environment",
            "install",
            "--dry-run",
            "--no-index",
        )
        code, said, error = program(
            *command,
            "--quiet",
            "--report",
            "-",
            wheel,
            PYTHONPATH="",
            PIP_DISABLE_PIP_VERSION_CHECK="1",
        )
        if code:
            return error
        return [f"{one['metadata']['name']}" for one in json.loads(said)["install"]]

    return resolve


@pytest.mark.parametrize("torch", ["2.8.0", "2.14.1", "2.15.0+cu130", "3.0.0"])
def test_installing_it_changes_no_other_package(dist, environment, torch):
    """pip's own resolver, which sees a torch by its metadata: it would install distclip alone."""
    (wheel,) = dist.glob("*.whl")
    assert environment(wheel, torch) == ["distclip"]


def test_a_torch_that_is_too_old_is_told(dist, environment):
    (wheel,) = dist.glob("*.whl")
    assert "torch>=2.8" in environment(wheel, "2.7.1")


def test_the_version_is_said_once():
    said = [
        path
        for path in (ROOT / "pyproject.toml", ROOT / "src/distclip/__init__.py", ROOT / "README.md")
        if distclip.__version__ in re.findall(r"\d+\.\d+\.\d+", path.read_text())
    ]
    assert said == [ROOT / "src/distclip/__init__.py"]
    assert version("packaging"), "vacuous: what the check of a release reads metadata with"


@pytest.mark.parametrize(
    "python, arch, tag",
    [
        ("linux-x86_64", "x86_64", "linux_x86_64"),
        ("linux-aarch64", "aarch64", "linux_aarch64"),
        ("macosx-10.13-universal2", "arm64", "macosx_11_0_arm64"),
        ("macosx-14.0-arm64", "arm64", "macosx_11_0_arm64"),
    ],
)
def test_a_wheel_is_named_by_what_the_compiler_made(monkeypatch, python, arch, tag):
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    monkeypatch.delenv("MACOSX_DEPLOYMENT_TARGET", raising=False)
    monkeypatch.setattr(hook.platform, "machine", lambda: arch)
    assert hook.platform_tag(python) == tag


# Files that other programs read


def check_schema(*arguments):
    return program("-m", "check_jsonschema", *arguments)


def test_the_forges_files_are_of_their_kind(tmp_path):
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [file.stem for file in files] == ["docs", "tests", "wheels"]
    code, said, error = check_schema("--builtin-schema", "vendor.github-workflows", *files)
    assert code == 0, said + error
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(files[0].read_text().replace("runs-on:", "run-on:"))
    assert check_schema("--builtin-schema", "vendor.github-workflows", wrong)[0] == 1


def test_what_the_forge_runs_is_there():
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(file.read_text())["jobs"]
        assert all("timeout-minutes" in job for job in jobs.values())
        lines = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
        for named in re.findall(r"\b(?:launch|tests)/[\w./]+", " ".join(lines)):
            assert (ROOT / named).exists(), named


def test_the_citation_names_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= cited.keys()
    assert cited["version"] == distclip.__version__
