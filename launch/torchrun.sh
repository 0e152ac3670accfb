#!/usr/bin/env bash
# Starts launch/train.py by torchrun; all arguments go to it: launch/torchrun.sh --config configs/fsdp2.yaml --training.lr 0.001
#   NPROC      ranks on this node; default: one a GPU, 2 without
#   NNODES     nodes; default 1. With more, run the same line on each node, with
#   MASTER_ADDR, MASTER_PORT   where rank 0's node can be reached; port 29500 by default
#   NODE_RANK  0 on the node of MASTER_ADDR, then 1, 2, …
cd "$(dirname "$0")/.." || exit 1
fail() { echo "launch/torchrun.sh: $1" >&2; exit 1; }
PATH="$PWD/.venv/bin:$PATH"
command -v torchrun >/dev/null || fail "torchrun was not found; run launch/test.sh or launch/demo.sh once (they make .venv), or pip install -e '.[dev]'"
[ $# -gt 0 ] || fail "say what to train: launch/torchrun.sh --config configs/fsdp2.yaml"
nodes=${NNODES:-1}
nproc=${NPROC:-$(nvidia-smi -L 2>/dev/null | grep -c . || true)}
[ "$nproc" -gt 0 ] || nproc=2
if [ "$nodes" = 1 ]; then
  rendezvous=(--standalone)
else
  [ -n "$MASTER_ADDR" ] && [ -n "$NODE_RANK" ] || fail "NNODES=$nodes needs MASTER_ADDR (the node of rank 0) and NODE_RANK (0 there)"
  rendezvous=(--node-rank "$NODE_RANK" --rdzv-backend c10d --rdzv-id "${JOB_ID:-distclip}" --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}"
    --rdzv-conf "is_host=$([ "$NODE_RANK" = 0 ] && echo 1 || echo 0)")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python="$(dirname "$(command -v torchrun)")/python" # of the same environment
exec "$python" launch/start.py torch.distributed.run --nnodes "$nodes" --nproc-per-node "$nproc" "${rendezvous[@]}" launch/train.py "$@"
