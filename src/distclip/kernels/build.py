"""Compiles the C kernels into a shared library beside their sources: `python -m
distclip.kernels.build`.

Nothing else compiles: an import or a rank of a job never does. Only the standard library is used
here, since the package's build hook runs this file where torch is not installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = (
    "clip.c",
    "avx2.h",
    "avx512.h",
    "edits.h",
    "half.h",
    "lanes.h",
    "plain.h",
    "sums.h",
    "unset.h",
)
# Not -march=native: the library chooses among instruction sets when it is loaded. Not -ffast-math:
# NaN and inf must survive. The last flags mean that nothing reads floating-point exceptions or
# errno; without them loops with a branch stay scalar.
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fno-trapping-math", "-fno-math-errno", "-w")


PLATFORM = f"{sys.platform}-{platform.machine()}"


def library_name() -> str:
    """File name of the library: its platform and a hash of what it is made from, so that a stale
    one is never loaded."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for source in SOURCES:
        digest.update((HERE / source).read_bytes())
    return f"libdistclip-{PLATFORM}-{digest.hexdigest()[:16]}.so"


def find_compiler() -> list[str] | None:
    """The command of the C compiler: $CC, or else the first of cc, gcc and clang that is found;
    None without one, and on Windows."""
    if os.name == "nt":
        return None
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    return None


def compile_into(folder: Path) -> Path:
    """Compile the library into `folder`, in place of older ones, and return its path.

    Safe where several processes do so at once: the file appears whole or not at all.

    Raises:
        RuntimeError: no compiler, or it failed; the message has its last lines.
    """
    program = find_compiler()
    if program is None:
        raise RuntimeError(
            "no C compiler was found (looked for $CC, or cc, gcc and clang); "
            "install one, or go on with torch's operations"
        )
    target = folder / library_name()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        fresh = Path(scratch) / target.name
        command = [*program, *FLAGS, str(HERE / "clip.c"), "-o", str(fresh), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = "\n".join(done.stderr.splitlines()[-10:])
            raise RuntimeError(f"the C compiler failed ({' '.join(command)}):\n{said}")
        os.replace(fresh, target)
    for old in folder.glob(f"libdistclip-{PLATFORM}-*.so"):
        if old != target:
            old.unlink(missing_ok=True)
    return target


def main() -> int:
    try:
        target = HERE / library_name()
        print(target if target.exists() else compile_into(HERE))
    except RuntimeError as error:
        print(f"distclip: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
