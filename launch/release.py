"""What launch/release.sh does: release.py build|check|try FOLDER"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email import message_from_bytes
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).parents[1]
EXTRAS = {
    "accelerate": ["accelerate"],
    "deepspeed": ["deepspeed"],
    "lightning": ["lightning"],
    "report": ["matplotlib", "msgspec", "numpy"],
    "tensorboard": ["tensorboard"],
    "transformers": ["transformers", "accelerate"],
    "wandb": ["wandb"],
}
# from another folder, with nothing of the source tree in sight
SMOKE = """
import torch, distclip, sys
from importlib.metadata import version
from distclip.kernels import native
assert "site-packages" in distclip.__file__, distclip.__file__
assert version("distclip") == distclip.__version__
names = {name: getattr(distclip, name) for name in distclip.__all__}
p = torch.nn.Parameter(torch.zeros(4))
p.grad = torch.tensor([3.0, 4.0, 0.0, 0.0])
report = distclip.GradClipper([("p", p)], max_norm=1.0).clip_()
assert report.total_norm.item() == 5.0 and abs(p.grad.norm().item() - 1) < 1e-6
print(f"distclip {distclip.__version__}, torch {torch.__version__}, {len(names)} public names")
"""


def run(*command: str | Path, **options) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)


def build(folder: Path) -> None:
    """The sdist from this folder, the wheel from the sdist."""
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(sdist) as archive:
            # Python before 3.11.4 has no filters; the archive is our own
            filters = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            archive.extractall(scratch, **filters)
        (tree,) = Path(scratch).iterdir()
        run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=tree)


def check(folder: Path) -> None:
    """Metadata and contents of all that lies there."""
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    assert wheels and len(sdists) == 1, f"{folder} has {len(wheels)} wheels, {len(sdists)} sdists"
    own = re.search(
        r'^__version__ = "(.+)"$', (ROOT / "src/distclip/__init__.py").read_text(), re.M
    )
    assert own is not None
    version = own[1]
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited and cited[1] == version, "CITATION.cff names another version"
    with tarfile.open(sdists[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        file = archive.extractfile(f"distclip-{version}/PKG-INFO")
        assert file is not None
        _check_metadata(file.read(), version)
    needed = {
        "LICENSE",
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "src/distclip/kernels/clip.c",
        "tests/conftest.py",
    }
    assert needed <= names, f"the sdist lacks {needed - names}"
    assert not [
        name for name in names if name.endswith((".so", ".pyc")) or name.startswith(".venv")
    ]
    for wheel in wheels:
        names = set(zipfile.ZipFile(wheel).namelist())
        info = f"distclip-{version}.dist-info"
        _check_metadata(zipfile.ZipFile(wheel).read(f"{info}/METADATA"), version)
        native = [name for name in names if name.endswith(".so")]
        assert len(native) == ("none-any" not in wheel.name), f"{wheel.name} has {native}"
        assert {"distclip/py.typed", f"{info}/licenses/LICENSE"} <= names
        assert {name.partition("/")[0] for name in names} <= {"distclip", info, "distclip.libs"}
        print(f"{wheel.name}: {len(names)} files, {'C kernels' if native else 'pure Python'}")


def _check_metadata(text: bytes, version: str) -> None:
    said = Metadata.from_email(text, validate=True)
    assert said.name == "distclip" and str(said.version) == version
    assert said.license_expression == "MIT" and said.description_content_type == "text/markdown"
    assert said.requires_python and said.summary and said.keywords and said.description
    needs = [str(need) for need in said.requires_dist or []]
    assert [need for need in needs if "extra" not in need] == ["torch>=2.8"], needs
    for extra, packages in EXTRAS.items():
        found = [
            need.partition(";")[0].strip()
            for need in needs
            if f'extra == "{extra}"' in need.replace("'", '"')
        ]
        assert sorted(found) == sorted(packages), (extra, found)
    authors = message_from_bytes(text).get_all("Author")
    assert authors == ["distclip developers"], authors


def try_installed(folder: Path) -> None:
    """In a new environment outside this folder, with this one's torch in sight."""
    wheel = next(path for path in folder.glob("*.whl"))
    elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "environment"
        run(sys.executable, "-m", "venv", "--without-pip", home)
        python = home / "bin" / "python"
        pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index")
        run(*pip, "--no-deps", wheel.resolve(), env=elsewhere)
        (site,) = home.glob("lib/python*/site-packages")
        ours = [path for path in sys.path if path.endswith("site-packages")]
        (site / "torch_of_another_environment.pth").write_text("\n".join(ours) + "\n")
        run(python, "-c", SMOKE, cwd=scratch, env=elsewhere)
        run(home / "bin" / "distclip", "--version", cwd=scratch, env=elsewhere)
        run(home / "bin" / "distclip", "doctor", "--only", "copies", cwd=scratch, env=elsewhere)


def main(command: str, folder: str) -> None:
    {"build": build, "check": check, "try": try_installed}[command](Path(folder).resolve())


if __name__ == "__main__":
    main(*sys.argv[1:])
