#!/usr/bin/env bash
# Puts the two lines that load this project into a checkout of Megatron-LM, or takes them out again.
#
#   scripts/apply_patches.sh PATH               into PATH/pretrain_gpt.py; shows the diff
#   scripts/apply_patches.sh PATH --check       changes nothing; exit status 1 where there is something to do
#   scripts/apply_patches.sh PATH --reverse     gives the file back as it was
#   scripts/apply_patches.sh PATH --script X    another training script than pretrain_gpt.py
#
# A tree that lacks a function which the project hooks is refused by name. It needs numpy and PyYAML, no torch.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x $python ]] || python=python3
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m megatron_smartmoe.cli.patches "$@"
