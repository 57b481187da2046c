#!/usr/bin/env bash
# Everything that must hold before a change lands: style, types, who imports whom, and the tests.
#
#   scripts/test.sh                  all of it, about 17 minutes on 2 cores
#   scripts/test.sh tests/unit -x    the checks, and these tests (arguments are pytest's)
#
# What a machine cannot run (a GPU, Slurm) is skipped with its reason, and counted in the last lines.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh --dev
export PATH="$PWD/.venv/bin:$PATH"
export SMARTMOE_REQUIRE_BUILD=1  # a library that is missing is a failure here, not a slow run

step() {
  echo "== $*"
  "$@"
}
step ruff check .
step ruff format --check .
step clang-format --dry-run --Werror csrc/*.* csrc/*/* tests/support/cuda_emulator/*
step mypy
step lint-imports --no-logo
step python -m pytest "$@"
