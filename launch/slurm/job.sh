# shellcheck shell=bash
# What the job scripts of this folder share: their arguments, sweeps, containers, and what a signal leads to. Sourced by
# them, not run.

: "${root:?is the folder of the project, which the job script knows}"

# Exit codes of a run that is to be started again: it was stopped with a checkpoint; or the warning, which is SIGUSR1,
# has ended a process that was not yet prepared for it.
stopped=75
warned_early=$((128 + 10))

usage() {
  cat <<HELP
usage: sbatch [options of sbatch] launch/slurm/$1 CONFIG [KEY=VALUE...] [options of megatron-lite train]

  sbatch --nodes=8 launch/slurm/$1 configs/runs/llama3-8b-64xa100.yaml
  sbatch --time=1:00:00 --signal=B:USR1@120 launch/slurm/$1 CONFIG run.name=first
  SWEEP=rates.txt sbatch --array=1-8 launch/slurm/$1 CONFIG
  CONTAINER_IMAGE=registry/megatron-lite:1 sbatch launch/slurm/$1 CONFIG

The job is queued again when the run was stopped before its time was up (or by scancel --signal=USR1 JOB), and goes on
from its checkpoint. Its state is that of the training: FAILED where a rank fails. Taken from the environment:

  PYTHON             the Python that has the package (default: .venv of this project, or python3)
  NPROC_PER_NODE     train.sbatch: processes on each node (default: its GPUs)
  SWEEP              a file of overrides; task N of the array takes those of line N, and its run is called NAME-N:
                     NAME is run.name where that is given, or the name of the file
  CONTAINER_IMAGE    run in this image, by enroot and pyxis
  CONTAINER_MOUNTS   what the container sees of the file system (default: the folder that the job was submitted from)
  MASTER_PORT        where the processes meet (default: one that follows from the number of the job)
  DRY_RUN            print the command, and end
HELP
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

is_count() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }

# begin SCRIPT ARGUMENTS...: sets arguments (of megatron-lite train), PYTHON, and where the processes meet.
begin() {
  local script=$1
  shift
  case ${1-} in
    -h | --help)
      usage "$script"
      exit 0
      ;;
    '' | -*) fail "the first argument is the config: sbatch launch/slurm/$script CONFIG; --help shows more" ;;
  esac
  [ -n "${SLURM_JOB_ID:-}" ] || fail "this is a job of Slurm: sbatch launch/slurm/$script $*"
  arguments=("$@")
  if [ -n "${SWEEP:-}" ]; then
    add_line_of_sweep
  elif [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    fail "each task of a job array would train the same run; give SWEEP=FILE, a line of overrides for each of them"
  fi
  # Of the container, where there is one.
  if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -n "${CONTAINER_IMAGE:-}" ] || [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python
  fi
  local names
  names=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # Nodes may be shared: jobs, and a job that was started again, meet on ports of their own. Systems take those from
  # 32768 on for outgoing connections.
  restarts=${SLURM_RESTART_COUNT:-0}
  # The number of one task of an array is that of the array, which means all of them.
  job=$SLURM_JOB_ID
  [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  export MASTER_ADDR=${names%%$'\n'*} MASTER_PORT=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID * 16 + restarts) % 12000))}
}

# Adds the overrides of this task of the array, and the name of its run.
add_line_of_sweep() {
  is_count "${SLURM_ARRAY_TASK_ID:-}" || fail "SWEEP=$SWEEP is for job arrays that count from 1: sbatch --array=1-N"
  [ -f "$SWEEP" ] || fail "SWEEP=$SWEEP: no such file"
  local line words name word
  line=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$SWEEP")
  # xargs takes quotes as a shell does, and expands nothing.
  words=$(xargs printf '%s\n' <<<"$line") || fail "$SWEEP: line $SLURM_ARRAY_TASK_ID has a quote that does not end"
  [ -n "$words" ] || fail "$SWEEP: line $SLURM_ARRAY_TASK_ID is empty; it has $(grep -c . "$SWEEP" || true) with overrides"
  mapfile -t words_of_line <<<"$words"
  name=$(basename "$SWEEP")
  name=${name%.*}
  for word in "${arguments[@]}" "${words_of_line[@]}"; do
    case $word in run.name=*) name=${word#run.name=} ;; esac
  done
  arguments+=("${words_of_line[@]}" "run.name=$name-$SLURM_ARRAY_TASK_ID")
}

# run_step OPTIONS... COMMAND...: srun in the background, where a signal to this shell finds it waiting. Ends the job.
run_step() {
  # A rank that fails is not to take the others along before they have said what they were waiting for; two minutes
  # after the first has ended the others are ended too. Since 22.05 srun does not know how many cores the tasks have.
  local command=(srun --kill-on-bad-exit=0 --wait=120 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}") code=0
  if [ -n "${CONTAINER_IMAGE:-}" ]; then
    command+=(--container-image="$CONTAINER_IMAGE" --container-mounts="${CONTAINER_MOUNTS:-$PWD:$PWD}" --container-workdir="$PWD")
  fi
  command+=("$@")
  printf '%s processes meet at %s:%s\n+' "$MEGATRON_LITE_WORLD_SIZE" "$MASTER_ADDR" "$MASTER_PORT"
  printf ' %q' "${command[@]}"
  printf '\n'
  [ -z "${DRY_RUN:-}" ] || exit 0
  # Slurm warns this shell alone (B: in --signal), which passes it on to the processes of the step.
  trap 'echo "SIGUSR1: asking the run to stop"; scancel --signal=USR1 "$job"' USR1
  # Where the job is cancelled the step hears of it as well; this shell has to be there when it ends.
  trap : TERM
  "${command[@]}" &
  local step=$!
  # A signal ends `wait`, and not srun.
  while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
  wait "$step" || code=$?
  case $code in "$stopped" | "$warned_early") requeue ;; esac
  # The state of a job is the exit code of its script.
  exit "$code"
}

# Puts the job into the queue again, unless it is cancelled, or Slurm has done so already.
requeue() {
  [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ] || return 0
  echo "the run was stopped; the job goes back into the queue, to go on from its last checkpoint"
  scontrol requeue "$job" || echo "error: it cannot be queued again; submit it once more to go on" >&2
}
