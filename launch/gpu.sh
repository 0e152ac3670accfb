#!/usr/bin/env bash
# launch/gpu.sh [--dry] [FOLDER]: shows on this machine's GPUs that distclip is right and how fast it is, in 8 minutes at most.
# Uses the Python that is there ($PYTHON, else python3) with its torch; installs nothing. --dry: only what needs no device.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "distclip: $python was not found; set PYTHON to a Python 3.10 or later that has torch" >&2; exit 1; }
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" launch/gpu.py "$@"
