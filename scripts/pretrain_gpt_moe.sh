#!/usr/bin/env bash
# Pretrain a GPT-MoE: the same line on a laptop, on a GPU node, inside sbatch or srun.
#
#   scripts/pretrain_gpt_moe.sh [--config configs/runs/X.yaml] [--nproc N] [--run-dir DIR] [--dry-run] [any Megatron flag...]
#
# --help explains the launcher's own flags; what they do is in megatron_smartmoe/adapter/launch/.
set -euo pipefail
trap '' USR2  # for the ranks alone, once they run (see pretrain_gpt_moe.slurm); what is started here ignores it too
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh"
exec "$root/.venv/bin/python" -m megatron_smartmoe.adapter.launch "$@"
