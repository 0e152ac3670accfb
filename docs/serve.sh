#!/usr/bin/env bash
# Builds the documentation as a site and serves it on this machine: docs/serve.sh [PORT]; --build only builds it, into docs/_build/html
source "$(dirname "$0")/../launch/environment.sh"
python -m sphinx -q -W --keep-going -b dirhtml docs docs/_build/html || fail "the pages have faults; see above"
[ "$1" = --build ] || exec python -m http.server --bind 127.0.0.1 --directory docs/_build/html "${1:-8000}"
