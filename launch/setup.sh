# shellcheck shell=bash
# Shared by the scripts of this folder: the virtual environment .venv, made once and kept up to date. Sourced, not run.
# Works with bash 3.2 (macOS).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
started=$(date +%s)

say() { printf '\033[1m%s\033[0m\n' "== $*"; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}
# Without a terminal, no colours.
[ -t 1 ] || say() { printf '== %s\n' "$*"; }

elapsed() { echo $(($(date +%s) - started)); }

# quietly LABEL COMMAND...: runs a command with its output in a log, says every few seconds that it goes on, and shows
# the end of the log if it fails.
quietly() {
  local label=$1 log pid begin now shown=0 status=0
  shift
  log=$(mktemp)
  begin=$(date +%s)
  "$@" >"$log" 2>&1 </dev/null &
  pid=$!
  # shellcheck disable=SC2064 # the process and the log of now
  trap "kill $pid 2>/dev/null; rm -f '$log'; exit 130" INT TERM
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.2
    now=$(($(date +%s) - begin))
    if [ -t 1 ]; then
      printf '\r   %s: %s s ' "$label" "$now"
    elif [ $((now - shown)) -ge 15 ]; then
      shown=$now
      printf '   %s: %s s\n' "$label" "$now"
    fi
  done
  wait "$pid" || status=$?
  trap - INT TERM
  [ ! -t 1 ] || printf '\r'
  if [ "$status" -ne 0 ]; then
    printf '   %s: failed\n' "$label"
    tail -n 40 "$log" >&2
    rm -f "$log"
    return "$status"
  fi
  printf '   %s: done in %s s\n' "$label" $(($(date +%s) - begin))
  rm -f "$log"
}

# The first Python that is new enough, as a command.
find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer found (python3 is $(python3 --version 2>&1 || true)); install one, or name it: PYTHON=/path/to/python3.12 bash $0"
}

make_venv() {
  local python
  if [ -e "$venv" ]; then
    "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
      fail "$venv holds no working Python 3.11 or newer; remove it (rm -rf '$venv') and run this again"
  else
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
      fail "$python cannot make virtual environments: its module venv or ensurepip is missing; on Debian or Ubuntu: apt install python3-venv"
    say "making .venv with $("$python" --version)"
    "$python" -m venv --without-pip "$venv"
  fi
  "$venv/bin/python" -c 'import pip' 2>/dev/null || quietly "installing pip" "$venv/bin/python" -m ensurepip
}

# What an install depends on, as one number: the sources, the compilers that are named, and the GPUs that the kernels
# are compiled for.
fingerprint() {
  "$venv/bin/python" - "$root" "$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u)" <<'PY'
import hashlib, os, pathlib, sys

root = pathlib.Path(sys.argv[1])
files = [root / name for name in ("pyproject.toml", "setup.py", "constraints.txt")]
files += sorted(path for path in (root / "csrc").rglob("*") if path.suffix in {".cpp", ".cu", ".cuh", ".h", ".py"})
chosen = [os.environ.get(name) for name in ("MEGATRON_LITE_CUDA_ARCHS", "CUDA_HOME", "NVCC", "CXX")]
digest = hashlib.sha256(f"{sys.version} {root} {chosen} {sys.argv[2]}".encode())
for path in files:
    digest.update(f"{path.relative_to(root)}".encode() + b"\0" + path.read_bytes())
print(digest.hexdigest())
PY
}

# install NAME EXTRAS: .venv with the package, its kernels built, and the extras ("[test]", or ""). Does nothing if the
# last install under this name had the same fingerprint, and builds nothing if one under another name had it.
install() {
  local stamp=$venv/.installed-$1 extras=$2 pip pinned=$venv/.constraints wanted
  make_venv
  wanted=$(fingerprint)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || [ ! -e "$root/megatron_lite/ops/_native_build.json" ]; then
    say "installing into .venv"
    # Modules are compiled when they are first imported: most of torch's never are.
    pip=("$venv/bin/python" -m pip install -q --disable-pip-version-check --no-compile -c "$pinned")
    # torch first: the build of the kernels uses its headers and links to it; that of the index, pybind11's headers. With
    # CUDA it brings the one Triton that it works with, and not always the one that is pinned.
    grep -v '^triton==' "$root/constraints.txt" >"$pinned"
    if [ -e "$root/megatron_lite/ops/_native_build.json" ] && grep -qsx "$wanted" "$venv"/.installed-*; then
      # The package is there already; pip brings what its extras ask for.
      quietly "what it needs" "${pip[@]}" "megatron-lite$extras"
      echo "$wanted" >"$stamp"
      return
    fi
    (cd "$root" && quietly "torch" "${pip[@]}" torch setuptools pybind11)
    "$venv/bin/python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("triton") is None)' ||
      cp "$root/constraints.txt" "$pinned"
    (cd "$root" && quietly "the package, its kernels and what it needs" "${pip[@]}" --no-build-isolation -e ".$extras")
    "$venv/bin/python" - "$root" <<'PY'
import json, pathlib, sys

report = json.loads((pathlib.Path(sys.argv[1]) / "megatron_lite/ops/_native_build.json").read_text())
for part, name in (("cpu", "C++ kernels for the CPU"), ("cuda", "CUDA C++ kernels"), ("index", "C++ index of the data")):
    built_for = report.get({"cpu": "cpu_sets", "cuda": "cuda_archs"}.get(part))
    built = f"built for {built_for}" if built_for else "built"
    print(f"   {name}: {'left out: ' + report[part] if report[part] else built}")
PY
    echo "$wanted" >"$stamp"
  fi
}
