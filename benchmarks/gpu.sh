#!/usr/bin/env bash
# Builds the package in place on a machine with a GPU, checks its kernels there and measures them, in under 9 minutes.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash benchmarks/gpu.sh [--out FOLDER] [--limit SECONDS] [--only PART...] [--smoke]

Needs a Python with torch (a CUDA build) and Triton, and nvcc for the CUDA C++ kernels. What else the package needs is
installed if it can be: from the folder of wheels that WHEELS names, else from the network.

Writes gpu.json (after each part) and gpu.md to FOLDER (build/gpu). Each part has a share of the time, 525 seconds by
default; one that fails or is cut off is in the report, and the others run. What is not installed and not ours (apex,
cuDNN's attention, compute-sanitizer) is "not here". `python benchmarks/gpu.py --help` lists the parts and their shares.

Exit codes: 0 all is well, 1 something failed or was cut off, 2 there is no torch or an argument is wrong, 143 it was
ended by SIGTERM (gpu.json and gpu.md have what was done until then).

PYTHON names the Python to use. --smoke runs everything that runs without a GPU, on the CPU and small; try it first:
  bash benchmarks/gpu.sh --smoke --only environment ceilings training
HELP
}

for argument in "$@"; do
  case $argument in
    -h | --help)
      usage
      exit 0
      ;;
  esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

"$python" -c 'import torch' || {
  echo "gpu.sh: $python has no torch; name one that has with PYTHON" >&2
  exit 2
}
missing=$("$python" - <<'CODE'
from importlib.util import find_spec

needed = {"numpy": "numpy", "pydantic": "pydantic", "yaml": "PyYAML", "typer": "typer", "rich": "rich",
          "tokenizers": "tokenizers", "safetensors": "safetensors", "setuptools": "setuptools", "pytest": "pytest"}
print(" ".join(package for module, package in needed.items() if find_spec(module) is None))
CODE
)
if [[ -n $missing ]]; then
  from=()
  [[ -n ${WHEELS:-} ]] && from=(--no-index --find-links "$WHEELS")
  # shellcheck disable=SC2086
  timeout 60 "$python" -m pip install --quiet --retries 0 "${from[@]}" $missing ||
    echo "gpu.sh: not installed: $missing; the parts that need them will say so" >&2
fi
exec "$python" benchmarks/gpu.py "$@"
