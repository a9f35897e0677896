#!/usr/bin/env bash
# Trains on this machine: torchrun with a rank for each GPU, which starts them again from the last checkpoint if one dies.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash launch/local.sh [options] CONFIG [KEY=VALUE...] [options of megatron-lite train]

  bash launch/local.sh --nproc 4 configs/runs/quickstart.yaml parallel.pp=4 parallel.tp=1

  --nproc N          ranks (default: the GPUs of this machine, or 1)
  --max-restarts N   how often all ranks are started again when one has died (default: 3)
  --dry-run          print the command, and end
  --help             this

PYTHON names the Python that has megatron_lite (default: that of .venv, or python3).
HELP
}

# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nproc=$(default_nproc)
max_restarts=3
dry_run=false
read_options "nproc:count max-restarts:number dry-run:flag" "$@"
need_module megatron_lite "-e ."

# The host's own name leads nowhere in many containers.
run_command "$dry_run" env "MEGATRON_LITE_WORLD_SIZE=$nproc" \
  "$python" -m megatron_lite.distributed.agent --standalone --local-addr 127.0.0.1 --nproc-per-node "$nproc" \
  --max-restarts "$max_restarts" -m megatron_lite train "${rest[@]}"
