#!/usr/bin/env bash
# Runs training programs of other packages with their own clipping and with distclip, and writes what it finds to docs/compatibility.md:
# launch/programs.sh [--keep] [PYTEST ARGUMENTS]. Their packages go into an environment in .venvs/, which is removed after the run unless
# --keep says otherwise; one that is there is used again. Then torchtitan's and other frameworks' tests that need this environment run there.
# With arguments, which go to pytest (launch/programs.sh --keep tests/programs -k timm), the page is left as it is.
#   PYTHON   which Python makes the environment, 3.11 or later (torchtitan asks for it); default python3
#   LIMIT    seconds for all; default 5400
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
fail() { echo "launch/programs.sh: $1" >&2; exit 1; }

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "$python was not found; set PYTHON to Python 3.11 or later"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$("$python" --version) is too old for torchtitan; set PYTHON to 3.11 or later"
keep=
[ "$1" = --keep ] && { keep=yes; shift; }

needs="torchtitan trl peft timm lightning accelerate transformers triton tensordict pyre-extensions iopath numpy pytest jsonargparse"
# torchrec asks for an old torchmetrics and for CUDA's fbgemm, torchvision for CUDA's torch; neither needs them on a CPU
bare="torchvision torchrec fbgemm-gpu-cpu"
tests=(tests/programs tests/integrations/test_torchtitan.py)

here=.venvs/programs
stamp="$needs $bare $(cksum <constraints.txt)"
[ -x $here/bin/python ] || "$python" -m venv $here || fail "no virtual environment could be made"
if [ "$(cat $here/installed 2>/dev/null)" != "$stamp" ]; then
  # torch first and pinned: an unpinned one brings several gigabytes of CUDA packages
  $here/bin/python -m pip install -q -c constraints.txt torch && $here/bin/python -m pip install -q -c constraints.txt $needs &&
    $here/bin/python -m pip install -q -c constraints.txt --no-deps $bare || fail "pip could not install; see its message above"
  echo "$stamp" >$here/installed
fi
run() { PATH="$PWD/$here/bin:$PATH" PYTHONPATH="$PWD/src" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$@"; }
run python -m distclip.kernels.build >/dev/null || echo "launch/programs.sh: without native kernels: they could not be compiled" >&2

results=.venvs/programs.xml
rm -f "$results"
# an interrupt, so that pytest still writes down what it has
run timeout -s INT -k 120 "${LIMIT:-5400}" python -m pytest -q -p no:cacheprovider -m "slow or not slow" -o junit_family=xunit1 --junitxml="$results" "${@:-"${tests[@]}"}"
code=$?
[ $# -gt 0 ] || run python launch/compatibility.py programs "$results" "$code" || code=1
[ -n "$keep" ] || rm -rf $here "$results"
exit $code
