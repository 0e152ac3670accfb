#!/usr/bin/env bash
# Starts launch/train.py by DeepSpeed's launcher; all arguments go to it: launch/deepspeed.sh --config configs/deepspeed_zero2.yaml
#   NPROC      ranks on each node; default: all GPUs, 2 without
#   HOSTFILE   several nodes: a file of lines "host slots=8"; DeepSpeed reaches the hosts by ssh
cd "$(dirname "$0")/.." || exit 1
fail() { echo "launch/deepspeed.sh: $1" >&2; exit 1; }
PATH="$PWD/.venv/bin:$PATH"
command -v deepspeed >/dev/null || fail "deepspeed was not found; run launch/test.sh once (it makes .venv), or pip install -e '.[dev]'"
[ $# -gt 0 ] || fail "say what to train: launch/deepspeed.sh --config configs/deepspeed_zero2.yaml"
options=(--no_local_rank) # train.py reads it from the environment
if nvidia-smi -L >/dev/null 2>&1; then
  [ -z "$NPROC" ] || options+=(--num_gpus "$NPROC")
else
  export DS_ACCELERATOR=cpu
  options+=(--num_gpus "${NPROC:-2}")
fi
[ -z "$HOSTFILE" ] || options+=(--hostfile "$HOSTFILE")
[ -n "$HOSTFILE" ] || options+=(--master_port "${MASTER_PORT:-29500}")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python="$(dirname "$(command -v deepspeed)")/python" # of the same environment
exec "$python" launch/start.py deepspeed.launcher.runner "${options[@]}" launch/train.py "$@"
