#!/usr/bin/env bash
# Strikes trainings with faults drawn from a seed, and judges every outcome by the program.
#
#   scripts/faults.sh [N] [--seed S] [--directory DIR]    N defaults to 200: about an hour on 2 free cores
#
# It may be ended at any time: the same command continues. What came of it is in docs/reliability.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh --dev
export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo
exec .venv/bin/python scripts/reliability/faults.py "$@"
