#!/usr/bin/env bash
# Everything that must hold before a change lands: style, types, who imports whom, and the tests.
#
#   scripts/test.sh                  all of it but the long ones, before a change lands: less than 20 minutes on 2 cores
#   scripts/test.sh --fast           while you work on a change: the checks, tests/unit, and one training test of each kind
#                                    (pytest -m "$FAST", below), less than 3 minutes on 2 cores
#   scripts/test.sh --long           the checks, and the tests that train for minutes: before a release
#   scripts/test.sh tests/unit -x    the checks, and these tests in one process (arguments are pytest's)
#
# Slurm's tests need the Debian packages slurm-wlm and munge. What a machine cannot run (a GPU, Slurm) is skipped, and
# counted by reason in the last lines, above the seconds that each step took.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

FAST="fast or not (dist or slow or slurm or gpu or long)"
# Four workers of pytest-xdist on two cores, since ranks wait half of their time; the tests of a file stay together. Few of
# the fast tests have ranks, and each worker takes seconds to collect all tests.
PARALLEL=(-n 4 --no-loadscope-reorder) FAST_PARALLEL=(-n 3 --no-loadscope-reorder)

seconds=()
report() {
  printf '%s\n' "== seconds" "${seconds[@]}" "$(printf '%6d  in all' "$SECONDS")"
}
step() {
  local begin=$SECONDS status=0
  echo "== $*"
  "$@" || status=$?
  seconds+=("$(printf '%6d  %.60s' $((SECONDS - begin)) "$*")")
  return $status
}
trap report EXIT
mypy_ends() { # with the status of what was started below
  local status=0
  wait "$mypy_pid" || status=$?
  cat "$mypy_log"
  return $status
}

# Where Python is told to keep no compiled modules, every worker and every rank compiles them all again.
unset PYTHONDONTWRITEBYTECODE

step scripts/setup.sh --dev
export PATH="$PWD/.venv/bin:$PATH"
export SMARTMOE_REQUIRE_BUILD=1 # a library that is missing is a failure here, not a slow run

step ruff check .
step ruff format --check .
step clang-format --dry-run --Werror csrc/*.* csrc/*/* tests/support/cuda_emulator/*
step lint-imports --no-logo
# Without its cache mypy takes a minute or two on one core: the tests begin meanwhile.
mypy_log=$(mktemp)
mypy >"$mypy_log" 2>&1 &
mypy_pid=$!
trap 'kill "$mypy_pid" 2>/dev/null || true; rm -f "$mypy_log"; report' EXIT
status=0
case ${1:-} in
  "") step python -m pytest "${PARALLEL[@]}" -m "not long" ;;
  --long) step python -m pytest -m long "${@:2}" ;;
  --fast) step python -m pytest "${FAST_PARALLEL[@]}" -m "$FAST" "${@:2}" ;;
  *) step python -m pytest "$@" ;;
esac || status=$?
step mypy_ends || status=$?
exit "$status"
