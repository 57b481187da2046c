#!/usr/bin/env bash
# Pretrain a GPT-MoE: the same line on a laptop, on a GPU node, inside sbatch or srun.
#
#   scripts/pretrain_gpt_moe.sh [--config configs/runs/X.yaml] [--nproc N] [--run-dir DIR] [--dry-run] [any Megatron flag...]
#
# --help lists the launcher's own flags, --help-megatron all others. The code is in megatron_smartmoe/adapter/launch/.
set -euo pipefail
trap '' USR2 # meant for the ranks (see pretrain_gpt_moe.slurm); everything that is started here ignores it
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh"
exec "$root/.venv/bin/python" -m megatron_smartmoe.adapter.launch "$@"
