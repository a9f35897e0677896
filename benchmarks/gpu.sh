#!/usr/bin/env bash
# Builds the package in place on a machine with a GPU, checks its kernels there and measures them, in under 9 minutes.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash benchmarks/gpu.sh [--out FOLDER] [--limit SECONDS] [--only PART...] [--smoke]

Needs a Python with torch (a CUDA build) and Triton, and nvcc for the CUDA C++ kernels. What else the package needs is
installed if it can be: from the folder of wheels that WHEELS names, else from the network. A part that fails is in the
report, and the others run. Writes gpu.json and gpu.md to FOLDER (build/gpu).

PYTHON names the Python to use. --smoke runs everything that runs without a GPU, on the CPU and small.
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
