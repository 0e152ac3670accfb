#!/usr/bin/env bash
# Installs what is missing, then lint, types and all tests. Arguments go to pytest: launch/test.sh -k parity
source "$(dirname "$0")/environment.sh"
failed=0
run() { echo "== $*"; "$@" || failed=1; }
run ruff format --check .
run ruff check .
run pyright
run pytest -q "$@"
exit $failed
