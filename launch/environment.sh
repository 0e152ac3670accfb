# Sourced: makes and reuses .venv in the project's root, and puts its programs first in PATH.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
fail() { echo "distclip: $1" >&2; exit 1; }

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "$python was not found; install Python 3.11 or later, or set PYTHON to one"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$("$python" --version) is too old; set PYTHON to Python 3.11 or later, which the versions of constraints.txt need"
[ -x .venv/bin/python ] || { echo "distclip: making .venv with $("$python" --version)"; "$python" -m venv .venv; } ||
  fail "no virtual environment could be made; install Python's venv module (on Debian: apt-get install python3-venv)"

stamp=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$stamp" ]; then
  echo "distclip: installing distclip and what its tests use into .venv (the versions of constraints.txt)"
  # torch first and pinned: an unpinned torch brings several gigabytes of CUDA packages
  .venv/bin/python -m pip install -q -c constraints.txt torch && .venv/bin/python -m pip install -q -c constraints.txt -e ".[dev]" ||
    fail "pip could not install; look at its message above (is there a network, or a package index that has these versions?)"
  echo "$stamp" >.venv/installed
fi
.venv/bin/python -m distclip.kernels.build >/dev/null || # only if the sources changed
  echo "distclip: the native kernels could not be compiled (is there a C compiler?); torch's operations serve, slower" >&2
# for the ranks of tests: where Python is told to write no bytecode, each would compile it all anew
.venv/bin/python -m compileall -q src launch
PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
