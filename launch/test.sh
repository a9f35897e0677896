#!/usr/bin/env bash
# Installs what the tests need and runs them all: linters and type checker included (tests/test_house.py).
set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash launch/test.sh [--matrix | --cluster] [pytest arguments]

  bash launch/test.sh                    every test, in two halves at the same time
  bash launch/test.sh tests/zero -k tied what pytest makes of these arguments
  bash launch/test.sh --matrix           the parity matrix: every layout of every proof model against one process
  bash launch/test.sh --cluster          every launcher for real on this machine: torchrun, Slurm, DeepSpeed, MPI and
                                         containers, over network namespaces. As root, on Debian or Ubuntu: installs
                                         what it needs with apt-get. Otherwise tests are left out, and say why

A test that takes more than 10 minutes ends the run with the stacks of all threads (--matrix: 60 minutes).
PYTHON names the Python (3.11 or newer) to make .venv with.
HELP
}

limit_s=600
cluster=false
arguments=()
for argument in "$@"; do
  case $argument in
    -h | --help)
      usage
      exit 0
      ;;
    --matrix)
      arguments+=(-m matrix)
      limit_s=3600
      ;;
    --cluster)
      arguments+=(-m cluster)
      cluster=true
      ;;
    *) arguments+=("$argument") ;;
  esac
done

# A program that a test of launchers starts, and the Debian package that has it.
programs=(
  slurmctld:slurm-wlm munged:munge sshd:openssh-server ssh:openssh-client pdsh:pdsh ompi_info:openmpi-bin ip:iproute2
  nsenter:util-linux setpriv:util-linux ping:iputils-ping iperf3:iperf3 ethtool:ethtool shellcheck:shellcheck
  debootstrap:debootstrap buildah:buildah podman:podman runc:runc
)

# install_programs: those of the list that are missing.
install_programs() {
  local entry missing=()
  for entry in "${programs[@]}"; do
    command -v "${entry%%:*}" >/dev/null || missing+=("${entry#*:}")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    say "not installed, and only root on Debian or Ubuntu can: ${missing[*]}"
    return 0
  fi
  export DEBIAN_FRONTEND=noninteractive
  # While this says no, no package starts its daemons; the tests start their own.
  local policy=/usr/sbin/policy-rc.d
  if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod +x $policy
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  quietly "the list of Debian packages" apt-get update -qq
  quietly "${missing[*]}" apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
if [ "$cluster" = true ]; then
  PATH=$PATH:/usr/sbin:/sbin
  (install_programs)
  install cluster "[test,cluster]"
  # Root has been given everything that the tests need: one that is left out would be a gap that nobody sees.
  [ "$(id -u)" != 0 ] || export MEGATRON_LITE_CLUSTER_REQUIRED=1
else
  install test "[test]"
fi

# A run of its own of the tests' processes: whatever ends the tests, none of them is left. bash is there as process 1,
# which has to wait for orphans.
apart=()
if [ "$cluster" = true ] && [ "$(id -u)" = 0 ]; then
  apart=(setpriv --pdeathsig KILL unshare --fork --kill-child --pid --mount-proc bash -c '"$@"; exit $?' tests)
fi

pytest=(${apart[@]+"${apart[@]}"} "$venv/bin/python" -m pytest --durations=10 --durations-min=1
  -o "faulthandler_timeout=$limit_s" -o faulthandler_exit_on_timeout=true)
say "testing"
# All tests of launchers are there: the other rooms need not be looked through.
[ "$cluster" = false ] || [ ${#arguments[@]} -gt 2 ] || arguments+=(tests/cluster tests/test_*.py)
[ ${#arguments[@]} -eq 0 ] || exec "${pytest[@]}" "${arguments[@]}"

# One test seldom keeps two cores busy: half of the rooms are tested beside the other half. In a group of its own (-m), as
# a process in the background of a script would ignore Ctrl-C, and with it what it starts.
beside=(benchmarks config data inference models ops optim parity pipeline planner report tensor_parallel utils verify)
log=$(mktemp)
set -m
"${pytest[@]}" "${beside[@]/#/tests/}" >"$log" 2>&1 </dev/null &
other=$!
set +m
trap 'kill -- "-$other" 2>/dev/null || true; rm -f "$log"' EXIT
say "first those of ${beside[*]}, into $log, beside all others"
status=0
"${pytest[@]}" "${beside[@]/#/--ignore=tests/}" || status=$?
say "those of ${beside[*]}"
wait "$other" || status=$?
cat "$log"
exit "$status"
