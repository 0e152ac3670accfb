#!/usr/bin/env bash
# Runs the tests with other releases of torch and writes docs/compatibility.md: launch/matrix.sh [--keep] [--core] [VERSION…]
# Without a version: those of the page, anew. The others keep their rows. Each release gets an environment in .venvs/, several gigabytes
# with CUDA's packages, which is removed after its run unless --keep says otherwise; one that is there is used again. --core leaves out what
# depends on torch least and takes longest: integrations, the doctor, builds and threads of the kernels.
#   PYTHON   which Python makes an environment; default python3
#   LIMIT    seconds for the tests of one release; default 5400
#   TESTS    what pytest runs in place of the page's selection; then the page is left as it is
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
fail() { echo "launch/matrix.sh: $1" >&2; exit 1; }

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "$python was not found; set PYTHON to Python 3.10 or later"
keep= core=
while [[ "$1" == --* ]]; do
  case $1 in
    --keep) keep=yes ;;
    --core) core=core ;;
    *) fail "$1 is no option; they are --keep and --core" ;;
  esac
  shift
done
versions=("$@")
[ $# -gt 0 ] || mapfile -t versions < <("$python" launch/compatibility.py versions)
# numpy: the interpreters of triton 3.5 and 3.6 (torch 2.9 and 2.11) do not run with later ones
needs="numpy<2.4 pytest pytest-xdist accelerate deepspeed lightning transformers matplotlib tensorboard hatchling tqdm rich jsonargparse pyyaml msgspec"
selection=(tests/{parity,precision,policies,faults,setup,measure,decide,apply,report,torch_internals})
if [ -n "$core" ]; then
  selection+=(tests/kernels/test_{reference,native,triton,step_kernels}.py)
else
  selection+=(tests/kernels tests/integrations tests/cli/test_doctor.py)
fi
for file in tests/test_*.py; do
  case $file in
    tests/test_benchmarks.py | tests/test_packaging.py) ;; # one measures; of the other torch has no part
    *) selection+=("$file") ;;
  esac
done

environment() { # of a version: what is missing is installed
  local here=.venvs/$1 stamp="torch==$1 $needs"
  if [ -n "$PYTHON" ] && [ -x "$here/bin/python" ] && [ "$("$here/bin/python" --version)" != "$("$python" --version)" ]; then
    rm -rf "$here" # of another Python than the one that was asked for
  fi
  [ -x "$here/bin/python" ] || "$python" -m venv "$here" || return 1
  [ "$(cat "$here/installed" 2>/dev/null)" = "$stamp" ] && return
  "$here/bin/python" -m pip install -q wheel && # deepspeed's setup.py asks for it
    "$here/bin/python" -m pip install -q --no-cache-dir $stamp && echo "$stamp" >"$here/installed"
}

failed=0
for version in "${versions[@]}"; do
  echo "== torch $version"
  environment "$version" || { echo "launch/matrix.sh: torch $version could not be installed; see pip's message above" >&2; failed=1; continue; }
  run() { PATH="$PWD/.venvs/$version/bin:$PATH" PYTHONPATH="$PWD/src" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$@"; }
  run python -m distclip.kernels.build >/dev/null || echo "launch/matrix.sh: without native kernels: they could not be compiled" >&2
  results=.venvs/$version.xml
  rm -f "$results"
  # an interrupt, so that pytest still writes down what it has
  run timeout -s INT -k 120 "${LIMIT:-5400}" python -m pytest -q -n 2 --dist loadfile -p no:cacheprovider --junitxml="$results" ${TESTS:-"${selection[@]}"}
  code=$?
  [ $code = 0 ] || failed=1
  if [ -z "$TESTS" ]; then
    run python launch/compatibility.py add "$version" "$results" "$code" $core || failed=1
  fi
  [ -n "$keep" ] || rm -rf ".venvs/$version" "$results"
done
exit $failed
