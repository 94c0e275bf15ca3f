#!/usr/bin/env bash
# The one test command: makes its own virtual environment, then lint, format, types and tests.
#
#   scripts/test.sh                      what CI runs
#   scripts/test.sh --full               with the long drills (tests marked `full`)
#   scripts/test.sh tests/layers -k mlp  any other argument goes to pytest
#
# T5X_LIKE_TEST_VENV names another virtual environment than .venv-test, PYTHON another Python to make it with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_environment.sh

selection=()
if [ "${1:-}" = --full ]; then
  selection=(-m "full or not full")
  shift
fi

make_environment "${T5X_LIKE_TEST_VENV:-.venv-test}" "[test]"
step() {
  echo "== $*"
  "$@"
}
step ruff check
step ruff format --check
step mypy
step pytest -n 2 --dist loadfile ${selection[@]+"${selection[@]}"} "$@"
