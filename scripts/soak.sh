#!/usr/bin/env bash
# Trains 5,000 steps on 4 ranks with every loop at work, five times, and looks for what grows, drifts or differs.
#
#   scripts/soak.sh [DIR] [--steps N]    under an hour on 2 cores, and the heap checks; DIR defaults to runs/soak
#
# It may be ended at any time: the same command resumes. What it prints and draws is in docs/reliability.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh --dev
export OMP_NUM_THREADS=1
exec .venv/bin/python scripts/reliability/soak.py "$@"
