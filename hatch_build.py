"""Build hook: compiles the native kernels into the wheel, or beside the sources where the install
is editable.

Without a C compiler the wheel is pure Python, and torch's operations serve.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def platform_tag(python: str) -> str:
    """Of what the compiler makes here.

    Args:
        python: the platform of this Python, which on macOS may be built for two processors while
            the compiler's library is for one.
    """
    if python.startswith("macosx"):
        release = os.environ.get("MACOSX_DEPLOYMENT_TARGET", "11.0")
        python = f"macosx-{release}-{platform.machine()}"
    return python.replace("-", "_").replace(".", "_")


class KernelsHook(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self.scratch: Path | None = None
        if self.target_name != "wheel":
            return
        folder = Path(self.root) / "src" / "distclip" / "kernels"
        # distclip itself would import torch
        spec = importlib.util.spec_from_file_location("build_kernels", folder / "build.py")
        assert spec is not None and spec.loader is not None
        kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernels)
        try:
            if version == "editable":
                kernels.compile_into(folder)
                return
            self.scratch = Path(tempfile.mkdtemp())
            library = kernels.compile_into(self.scratch)
        except (RuntimeError, OSError) as error:
            self.app.display_warning(f"distclip is built without its native kernels: {error}")
            return
        build_data["force_include"][str(library)] = f"distclip/kernels/{library.name}"
        build_data["pure_python"] = False
        # ctypes: no ABI of Python or torch
        build_data["tag"] = f"py3-none-{platform_tag(sysconfig.get_platform())}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)
