# shellcheck shell=bash
# Shared by the scripts that start ranks: their options, their Python, their complaints. Sourced, not run.
#
# PYTHON names the Python that has megatron_lite (default: that of .venv, or python3).

common_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  [ ! -x "$common_root/.venv/bin/python" ] || python=$common_root/.venv/bin/python
fi

# misuse MESSAGE: for what the user can mend.
misuse() {
  printf 'error: %s; bash %s --help shows the options\n' "$*" "$0" >&2
  exit 2
}

is_count() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }
is_number() { [[ $1 =~ ^(0|[1-9][0-9]*)$ ]]; }
is_port() { is_count "$1" && [ "$1" -le 65535 ]; }

# count OPTION VALUE, number OPTION VALUE, port OPTION VALUE: refuses a value that is none.
count() { is_count "$2" || misuse "$1 '$2': give a number of 1 or more"; }
number() { is_number "$2" || misuse "$1 '$2': give a number of 0 or more"; }
port() { is_port "$2" || misuse "$1 '$2': give a port, 1 to 65535"; }

# read_options "NAME:KIND..." ARGUMENTS...: sets the variable of each option that is given (--max-restarts: max_restarts),
# and rest, the arguments from CONFIG on. Kinds: text, count, number, port, and flag, which is then true.
read_options() {
  local known=" $1 " name kind
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      -*) ;;
      *) break ;;
    esac
    name=${1#--}
    [[ $known =~ " $name:"([a-z]+)" " ]] || misuse "$1: no such option; those of megatron-lite train come after CONFIG"
    kind=${BASH_REMATCH[1]}
    case $kind in
      flag)
        printf -v "${name//-/_}" true
        shift
        continue
        ;;
      text) [ -n "${2-}" ] || misuse "$1: there is nothing after it" ;;
      *) "$kind" "$1" "${2-}" ;;
    esac
    printf -v "${name//-/_}" %s "$2"
    shift 2
  done
  rest=("$@")
  [ $# -gt 0 ] || misuse "there is no CONFIG"
}

# The GPUs of this machine, or 1: how many ranks it is to have if nobody says.
default_nproc() {
  local gpus
  if [ -n "${CUDA_VISIBLE_DEVICES-}" ]; then
    gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
  else
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c ^GPU) || gpus=0
  fi
  echo $((gpus > 0 ? gpus : 1))
}

# address_of HOST: an address of that name as this machine has it, empty if it has none.
address_of() { { getent ahostsv4 "$1" || getent ahosts "$1" || true; } | awk 'NR == 1 { print $1 }'; }

# need_module NAME PACKAGE: refuses to go on without a Python module.
need_module() {
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null ||
    misuse "$python has no module $1; install it (pip install $2), or name another Python: PYTHON=/path/to/python"
}

# run_command DRY_RUN COMMAND...: prints the command as one that can be pasted, and becomes it unless DRY_RUN is true.
run_command() {
  local dry_run=$1
  shift
  printf '+' >&2
  printf ' %q' "$@" >&2
  printf '\n' >&2
  [ "$dry_run" = false ] || exit 0
  exec "$@"
}
