#!/usr/bin/env bash
# Installs what is missing, then lint, types and all tests. Arguments go to pytest: launch/test.sh -k parity
# --fast, which stands first: the tests of tests/fast.txt alone, a minute and a half with lint and types
source "$(dirname "$0")/environment.sh"
if [ "$1" = --fast ]; then
  mapfile -t fast < <(grep '^tests/' tests/fast.txt)
  set -- "${fast[@]}" "${@:2}"
fi
failed=0
run() { echo "== $*"; "$@" || failed=1; }
run ruff format --check .
run ruff check .
run pyright
# two files at a time: each has ranks of its own, which mostly wait for one another; -n0 turns it off
run pytest -q -n 2 --dist loadfile "$@"
exit $failed
