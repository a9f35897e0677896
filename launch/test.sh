#!/usr/bin/env bash
# Installs what the tests need and runs them all: linters and type checker included (tests/test_house.py).
set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash launch/test.sh [--matrix] [pytest arguments]

  bash launch/test.sh                    every test
  bash launch/test.sh tests/zero -k tied what pytest makes of these arguments
  bash launch/test.sh --matrix           the parity matrix: every layout of every proof model against one process

A test that takes more than 10 minutes ends the run with the stacks of all threads (--matrix: 60 minutes).
PYTHON names the Python (3.11 or newer) to make .venv with.
HELP
}

limit_s=600
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
    *) arguments+=("$argument") ;;
  esac
done

# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
install test "[test]"

say "testing"
exec "$venv/bin/python" -m pytest --durations=10 --durations-min=1 -o faulthandler_timeout=$limit_s -o faulthandler_exit_on_timeout=true \
  ${arguments[@]+"${arguments[@]}"}
