#!/usr/bin/env bash
# Trains on several machines: the same command on each of them starts torchrun's agent there, and the agents meet at one.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash launch/torchrun.sh --nodes N --head HOST [options] CONFIG [KEY=VALUE...] [options of megatron-lite train]

  bash launch/torchrun.sh --nodes 2 --head node1 --nproc 8 configs/runs/quickstart.yaml      on node1, and on node2

  --nodes N, MIN:MAX how many machines; with MIN:MAX any number of them: when one is lost the others go on from the last
                     checkpoint, and it may come back. The head is not to be lost: the agents meet there
  --head HOST[:PORT] where they meet: a name or an address of one of the machines, as the others know it (port: 29400)
  --nproc N          ranks on this machine (default: its GPUs, or 1)
  --max-restarts N   how often the ranks are started again when one has died (default: 3)
  --id NAME          the name of the job, the same on every machine (default: megatron-lite)
  --patience S       with MIN:MAX: how many seconds to wait for more machines when MIN are there (default: 30)
  --wait S           how many seconds to wait for the head, and for MIN machines (default: 600)
  --dry-run          print the command, and end
  --help             this

All machines see the same files: the configuration, the data, and the folder of the run. run.network_interface names
the interface between them, where a machine has several.
PYTHON names the Python that has megatron_lite (default: that of .venv, or python3).
HELP
}

# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nodes='' head='' id=megatron-lite patience=30 wait=600 max_restarts=3 dry_run=false
nproc=$(default_nproc)
read_options "nodes:text head:text id:text nproc:count max-restarts:number patience:number wait:number dry-run:flag" "$@"
[[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || misuse "--nodes '$nodes': give a number of machines, like 2, or 1:4"
least=${nodes%:*} most=${nodes#*:}
[ "$least" -le "$most" ] || misuse "--nodes $nodes: the first number is the larger one"
[ -n "$head" ] || misuse "--head is missing: where do the machines meet?"
need_module megatron_lite "-e ."

head_port=29400
if [[ $head =~ ^([^:]+):([0-9]+)$ ]]; then
  head=${BASH_REMATCH[1]}
  head_port=${BASH_REMATCH[2]}
  port "--head $head: port" "$head_port"
fi

[[ $head != *:* ]] || misuse "--head $head: give a name or an IPv4 address, and a port behind a colon"

# find_head HOST PORT: whether this machine is it (1 or 0), and the address by which the others reach this one, if that
# can be told. torchrun compares names, and its agents wait for one another where the head is given by the address of a
# second interface.
find_head() {
  "$python" - "$@" <<'PY'
import socket, sys

name, port = sys.argv[1], int(sys.argv[2])
try:
    family, kind, _, _, address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
except OSError as error:
    sys.exit(f"error: --head {name}: {error.strerror}; give a name or an address that this machine knows")
with socket.socket(family, kind) as probe:
    try:
        probe.bind((address[0], 0))
    except OSError:
        is_head = False
    else:
        is_head, own = True, address[0]
if is_head:
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            sys.exit(f"error: --head: port {port} of this machine cannot be used ({error.strerror}); choose another one, "
                     f"the same on every machine: --head {name}:PORT")
else:
    with socket.socket(family, socket.SOCK_DGRAM) as route:  # sends nothing
        try:
            route.connect(address[:2])
            own = route.getsockname()[0]
        except OSError as error:
            sys.exit(f"error: --head {name}: there is no way from this machine to {address[0]} ({error.strerror})")
print(int(is_head), "" if own.startswith("127.") or own == "::1" else own)
PY
}

# wait_for_head HOST PORT SECONDS: torchrun itself gives up after one minute.
wait_for_head() {
  "$python" - "$@" <<'PY'
import socket, sys, time

name, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
deadline, told = time.monotonic() + seconds, False
while True:
    try:
        socket.create_connection((name, port), timeout=5).close()
        break
    except OSError as error:
        if time.monotonic() > deadline:
            sys.exit(f"error: nobody answers at {name}:{port} ({error.strerror or error}); start the same command on "
                     f"{name}, and see that no firewall stands between it and this machine")
        if not told:
            print(f"waiting for {name}:{port}, at most {seconds:g} s", file=sys.stderr, flush=True)
        told = True
        time.sleep(0.2)
PY
}

place=$(find_head "$head" "$head_port") || exit 2
read -r is_head own <<<"$place"
if [ "$is_head" = 0 ] && [ "$dry_run" = false ]; then
  wait_for_head "$head" "$head_port" "$wait" || exit 2
fi

# The agent is torchrun's; one that is cut off from the head, and has no ranks any more, ends. join_timeout is how long the
# agents wait for the least number of them; last_call_timeout, for more; read_timeout, for an answer of the head.
run_command "$dry_run" env "MEGATRON_LITE_WORLD_SIZE=$((least * nproc)):$((most * nproc))" \
  "$python" -m megatron_lite.distributed.agent --nnodes "$nodes" --nproc-per-node "$nproc" \
  --max-restarts "$max_restarts" --rdzv-backend c10d --rdzv-endpoint "$head:$head_port" --rdzv-id "$id" \
  --rdzv-conf "is_host=$is_head,join_timeout=$wait,last_call_timeout=$patience,read_timeout=30" ${own:+--local-addr "$own"} \
  -m megatron_lite train "${rest[@]}"
