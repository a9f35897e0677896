#!/usr/bin/env bash
# What train.sbatch runs on each node: torchrun's agent. Takes CONFIG and the rest of the arguments of
# `megatron-lite train`.
set -euo pipefail

# A warning goes to every process of a step: to the ranks, which write a checkpoint and end, and to the agent, which
# ignores it, as it would only pass it on.
trap '' USR1
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT

# Agents whose host has another name than the node (node1.cluster) do not see that the address is theirs: node 0 is told.
command=(
  "$PYTHON" -m megatron_lite.distributed.agent --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$NPROC_PER_NODE"
  --max-restarts=0 --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT"
  --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
  --rdzv-conf="is_host=$((SLURM_NODEID == 0)),read_timeout=30" -m megatron_lite train "$@"
)
if [ "$SLURM_NODEID" = 0 ]; then
  printf '+'
  printf ' %q' "${command[@]}"
  printf '\n'
fi
exec "${command[@]}"
