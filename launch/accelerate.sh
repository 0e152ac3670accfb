#!/usr/bin/env bash
# Starts launch/train.py by Accelerate: first Accelerate's own configuration, then arguments of train.py:
#   launch/accelerate.sh configs/accelerate/fsdp2.yaml --config configs/accelerate.yaml
# NPROC (ranks over all nodes) and, for several nodes, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT go over that file.
cd "$(dirname "$0")/.." || exit 1
fail() { echo "launch/accelerate.sh: $1" >&2; exit 1; }
PATH="$PWD/.venv/bin:$PATH"
command -v accelerate >/dev/null || fail "accelerate was not found; run launch/test.sh once (it makes .venv), or pip install -e '.[dev]'"
[ -f "$1" ] || fail "${1:-nothing} is no file; the first argument is Accelerate's configuration: configs/accelerate/{ddp,fsdp1,fsdp2,deepspeed}.yaml"
options=(--config_file "$1")
shift
[ -z "$NPROC" ] || options+=(--num_processes "$NPROC")
if [ "${NNODES:-1}" != 1 ]; then
  [ -n "$MASTER_ADDR" ] && [ -n "$MASTER_PORT" ] && [ -n "$NODE_RANK" ] ||
    fail "NNODES=$NNODES needs MASTER_ADDR (the node of rank 0), MASTER_PORT and NODE_RANK (0 there)"
  options+=(--num_machines "$NNODES" --machine_rank "$NODE_RANK" --main_process_ip "$MASTER_ADDR")
fi
options+=(--main_process_port "${MASTER_PORT:-0}") # 0: a free one
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python="$(dirname "$(command -v accelerate)")/python" # of the same environment
exec "$python" launch/start.py accelerate.commands.launch "${options[@]}" launch/train.py "$@"
