#!/usr/bin/env bash
# From nothing to a Llama that was trained over 8 processes as tensor 2 x pipeline 2 x data 2, on the cores of this machine.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash launch/quickstart.sh [options]

Makes .venv, installs, builds the kernels, prepares a corpus, trains, evaluates, leaves metrics, checkpoints and a report
in runs/quickstart/, and lets the model write a few lines. What is already done is not done again, except the training.

  --steps N          optimizer steps (default: train.num_steps of configs/runs/quickstart.yaml)
  --layout LAYOUT    how to spread the work, like tp=1,pp=4,dp=2 (default: tp=2,pp=2,dp=2). The number of processes is
                     the product. Also: sp (sequence parallel), gpipe or 1f1b, zero=0 or zero=1
  --model FILE       a model of configs/models/ (default: configs/models/llama-tiny.yaml)
  --text FILE...     train on these text or JSONL files (default: the source files of the Python standard library)
  --help             this

PYTHON names the Python (3.11 or newer) to make .venv with.
HELP
}

data=data/quickstart
nproc=8
overrides=()
texts=()

absolute() {
  [ -f "$1" ] || { printf 'error: %s: no such file\n' "$1" >&2; exit 2; }
  echo "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"
}

misuse() {
  printf 'error: %s; bash launch/quickstart.sh --help shows the options\n' "$*" >&2
  exit 2
}

# The smallest text of which a fifth is a few samples of train.seq_len (256 tokens of some 4 bytes).
least_bytes=16384
# A hundredth is held out: little enough to evaluate on all of it.
valid_percent=1

# choose_valid_percent FILE...: of a small text as much more as makes 20 samples, and a fifth at most.
choose_valid_percent() {
  local wanted=$((20 * 256 * 4)) bytes
  bytes=$(($(cat "$@" | wc -c)))
  [ "$bytes" -ge "$least_bytes" ] ||
    misuse "--text: $bytes bytes are too few to train and to evaluate on; give at least $least_bytes"
  valid_percent=$(((wanted * 100 + bytes - 1) / bytes))
  [ "$valid_percent" -le 20 ] || valid_percent=20
}

is_count() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }

read_layout() {
  local part tp=1 pp=1 dp=1
  local IFS=,
  for part in $1; do
    case $part in
      tp=* | pp=* | dp=*)
        is_count "${part#*=}" || misuse "--layout $1: '$part' is not a size"
        printf -v "${part%%=*}" %s "${part#*=}"
        ;;
      sp) overrides+=(parallel.sequence_parallel=true) ;;
      gpipe | 1f1b) overrides+=("parallel.schedule=$part") ;;
      zero=[0-9]) overrides+=("parallel.zero_stage=${part#zero=}") ;;
      *) misuse "--layout $1: '$part' is not understood; a layout is like tp=1,pp=4,dp=2" ;;
    esac
  done
  nproc=$((tp * pp * dp))
  overrides+=("parallel.tp=$tp" "parallel.pp=$pp" "parallel.dp=$dp")
}

while [ $# -gt 0 ]; do
  case $1 in
    --steps)
      is_count "${2-}" || misuse "--steps '${2-}': give a number of steps, like --steps 50"
      # A short run warms up for a tenth of its steps.
      overrides+=("train.num_steps=$2")
      [ "$2" -ge 100 ] || overrides+=("optim.warmup_steps=$(($2 / 10))")
      shift 2
      ;;
    --layout)
      [ -n "${2-}" ] || misuse "--layout: give a layout, like --layout tp=1,pp=4,dp=2"
      read_layout "$2"
      shift 2
      ;;
    --model)
      [ -n "${2-}" ] || misuse "--model: give a file, like --model configs/models/gpt2-tiny.yaml"
      model=$(absolute "$2")
      overrides+=("model=$model")
      shift 2
      ;;
    --text)
      shift
      while [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; do
        text=$(absolute "$1")
        texts+=("$text")
        shift
      done
      [ ${#texts[@]} -gt 0 ] || misuse "--text: name at least one file"
      choose_valid_percent "${texts[@]}"
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    *) misuse "$1: no such option" ;;
  esac
done

# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

install quickstart ""
ml=$venv/bin/megatron-lite

if [ ${#texts[@]} -gt 0 ]; then
  texts_or_stdlib=("${texts[@]}")
else
  texts_or_stdlib=(--stdlib)
fi
# The corpus is prepared anew when it is to come from other files, or these have changed.
wanted=$("$venv/bin/python" --version; [ ${#texts[@]} -eq 0 ] || ls -ln "${texts[@]}")
if [ ! -f "$data/meta.json" ] || [ "$(cat "$data/made-from" 2>/dev/null)" != "$wanted" ]; then
  say "preparing the corpus in $data"
  rm -f "$data/made-from"
  valid_fraction=$(printf '0.%02d' "$valid_percent")
  "$ml" data "${texts_or_stdlib[@]}" --out "$data" --overwrite --vocab-size 4096 --valid-fraction "$valid_fraction"
  echo "$wanted" >"$data/made-from"
fi

say "training with $nproc processes"
"$ml" train configs/runs/quickstart.yaml ${overrides[@]+"${overrides[@]}"} --nproc "$nproc" --overwrite

# The standard library is Python; of another text nothing is known, and the model begins at the beginning.
prompt="def "
[ ${#texts[@]} -eq 0 ] || prompt=
say "a sample: megatron-lite generate runs/quickstart --prompt '$prompt'"
"$ml" generate runs/quickstart --prompt "$prompt" --max-new-tokens 100 --temperature 0.7 --top-p 0.95 --seed 1 --device cpu
echo "$(elapsed) s in all"
