#!/usr/bin/env bash
# Trains on the machines of a hostfile with DeepSpeed's launcher: started once, over ssh (pdsh), or on each of them.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash launch/deepspeed/train.sh [options] CONFIG [KEY=VALUE...] [options of megatron-lite train]

  bash launch/deepspeed/train.sh --hostfile hosts configs/runs/quickstart.yaml            on one machine, which logs in
                                                                                        to all by ssh, with pdsh
  bash launch/deepspeed/train.sh --hostfile hosts --no-ssh configs/runs/quickstart.yaml   on each of them, without ssh

  --hostfile FILE    a line for each machine, like "node1 slots=8" (default: launch/deepspeed/hostfile; there is a
                     hostfile.example beside it)
  --nproc N          ranks on each machine (default: all of its slots)
  --no-ssh           start the ranks of this machine only
  --node-rank I      with --no-ssh: which line of the hostfile this machine is, from 0 (default: the one with its name)
  --head ADDRESS     where the ranks meet: an address of the first machine that the others reach (default: that of its
                     name)
  --port PORT        where they meet (default: 29500)
  --dry-run          print the command, and end
  --help             this

All machines see the same files: the configuration, the data, and the folder of the run. Over ssh the ranks get no other
variables than those in .deepspeed_env, here or in the home folder (launch/deepspeed/deepspeed_env.example) and those
whose names begin with PYTHON or NCCL. Without GPUs set DS_ACCELERATOR=cpu there, too.
PYTHON names the Python that has megatron_lite and deepspeed (default: that of .venv, or python3).
HELP
}

here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
. "$here/../common.sh"

hostfile=$here/hostfile nproc='' no_ssh=false node_rank='' head='' port=29500 dry_run=false
read_options "hostfile:text head:text nproc:count node-rank:number port:port no-ssh:flag dry-run:flag" "$@"
# DeepSpeed goes on alone, on this machine, where it finds no hostfile.
[ -f "$hostfile" ] || misuse "--hostfile $hostfile: no such file; write a line like 'node1 slots=8' for each machine"

hosts=()
world_size=0
while read -r line || [ -n "$line" ]; do
  line=${line%%#*}
  [ -n "${line//[[:space:]]/}" ] || continue
  [[ $line =~ ^([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]] ||
    misuse "$hostfile: '$line' is not like 'node1 slots=8'"
  host=${BASH_REMATCH[1]} slots=${BASH_REMATCH[2]}
  [ "${nproc:-1}" -le "$slots" ] || misuse "--nproc $nproc: $hostfile gives $host $slots slots"
  getent ahosts "$host" >/dev/null || misuse "$hostfile: nobody knows the host $host; correct it, or add it to /etc/hosts"
  hosts+=("$host")
  world_size=$((world_size + ${nproc:-slots}))
done <"$hostfile"
[ ${#hosts[@]} -gt 0 ] || misuse "$hostfile names no machine"
need_module megatron_lite "-e ."
need_module deepspeed deepspeed

if [ -z "$head" ]; then
  head=$(address_of "${hosts[0]}")
  [[ ${#hosts[@]} -eq 1 || $head != 127.* ]] ||
    misuse "${hosts[0]} is $head here, where the others cannot reach it; give its address: --head ADDRESS"
fi

options=(--hostfile "$hostfile" --master_addr "$head" --master_port "$port")
[ -z "$nproc" ] || options+=(--num_gpus "$nproc")
if [ "$no_ssh" = true ]; then
  if [ -z "$node_rank" ]; then
    for index in "${!hosts[@]}"; do
      [[ ${hosts[index]} != "$(hostname)" && ${hosts[index]} != "$(hostname -s)" ]] || node_rank=$index
    done
    [ -n "$node_rank" ] || misuse "--no-ssh: $hostfile has no line for $(hostname); say which one it is: --node-rank I"
  fi
  [ "$node_rank" -lt ${#hosts[@]} ] || misuse "--node-rank $node_rank: $hostfile names ${#hosts[@]} machines, from 0"
  options+=(--no_ssh --node_rank "$node_rank")
elif ! command -v pdsh >/dev/null; then
  misuse "pdsh is not installed; install it (apt install pdsh), or run this on every machine with --no-ssh"
fi

# env tells the ranks of every machine how many they have to be: DeepSpeed hands on few variables.
run_command "$dry_run" "$python" -m deepspeed.launcher.runner "${options[@]}" --no_python --no_local_rank \
  env "MEGATRON_LITE_WORLD_SIZE=$world_size" "$python" -m megatron_lite train "${rest[@]}"
