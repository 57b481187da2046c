#!/usr/bin/env bash
# Runs everything that needs a GPU: kernels against their twins (again under compute-sanitizer where it is installed),
# their speed, and training through the launcher on one GPU with NCCL.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh --dev
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
.venv/bin/python -m pytest tests/gpu "$@"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 .venv/bin/python -m pytest -q tests/gpu/test_ops_gpu.py -k "skewed or strided or tiny"
  done
else
  echo "gpu_check: compute-sanitizer is not on PATH; kernels were not run under it"
fi
.venv/bin/python scripts/bench_ops.py --device cuda
scripts/pretrain_gpt_moe.sh --config configs/runs/quickstart.yaml --nproc 1 --bf16 \
  --expert-model-parallel-size 1 --pipeline-model-parallel-size 1
