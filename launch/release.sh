#!/usr/bin/env bash
# Builds sdist and wheel into dist/, checks them, installs the wheel into a new environment outside this folder and tries it there:
#   launch/release.sh --dry
# Nothing is uploaded; without --dry it says what is left to do by hand (RELEASING.md).
source "$(dirname "$0")/environment.sh"
[ $# = 0 ] || [ "$*" = --dry ] || fail "launch/release.sh takes --dry or nothing, not $*"
rm -rf dist
python launch/release.py build dist && python launch/release.py check dist && python launch/release.py try dist || exit 1
if [ "$1" != --dry ]; then
  echo "dist/ is right. Now tag the commit, let the workflow build wheels for other platforms, and upload by hand: RELEASING.md, from step 5"
fi
