#!/usr/bin/env bash
# Installs what is missing, then trains three times on two CPU processes: no clipping, norm clipping, value clipping.
source "$(dirname "$0")/environment.sh"
echo "distclip: three trainings on 2 processes, about half a minute"
torchrun --standalone --nproc-per-node 2 launch/demo.py || fail "the demo failed; the lines above say on which rank"
