#!/usr/bin/env bash
# The first twelve minutes on a machine with one GPU: grouped GEMM, kernels against their twins, several ranks on the one
# GPU, training, compute-sanitizer, speed, a trace of a layer. It needs no package registry and no .venv: the machine's
# own python3 with torch, pytest and hypothesis, this folder, and two things that are brought along:
#
#   on a machine with a registry and the same Python:
#     python3 -m pip download --no-deps --only-binary=:all: -d .whl megatron-core==0.19.2
#     TORCH_CUDA_ARCH_LIST=9.0 SMARTMOE_CUDA=1 python3 megatron_smartmoe/ops/_build.py
#   on the GPU's machine:
#     scripts/gpu_check.sh --out gpu-check            results.json, results.md (a table for docs/benchmarks.md), logs
#
# Every step has its own time limit, and none stops the next. Options: scripts/gpu_check.sh --help. PYTHON names the
# interpreter (default: .venv/bin/python if it is there, else python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
if compgen -G ".whl/*.whl" >/dev/null; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target .site .whl/*.whl
  export PYTHONPATH="$PWD/.site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
exec "$PYTHON" -m scripts.gpu.check "$@"
